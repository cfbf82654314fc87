// What more ranks would give, computed from what a few have given.

export interface Setting {
  /** Of all ranks together. */
  tokens: number
  topk: number
  hidden: number
  half: number
  experts: number
  /** Of an element. */
  bytes: number
}

export type Backend = 'gloo' | 'nccl'

/** On the CPU a layer small enough for two cores; on GPUs Qwen3-30B-A3B's. */
export const settings: Record<Backend, Setting> = {
  gloo: { tokens: 512, topk: 4, hidden: 1024, half: 512, experts: 32, bytes: 2 },
  nccl: { tokens: 4096, topk: 8, hidden: 2048, half: 768, experts: 128, bytes: 2 },
}

/** Milliseconds. */
export interface Measured {
  scheme: string
  ranks: number
  chunks: number
  /** The layer over the ranks. */
  layer: number
  /** What a rank's experts do for it, without other ranks. */
  experts: number
  /** The collectives of the layer's sizes, without the layer. */
  communication: number
  /** The same collectives with next to nothing in them. */
  latency: number
  /** How far the least certain of these but the last may be off, as a share of it. */
  error: number
  /** Of samples: the times are medians of their medians. */
  blocks: number
}

/** Nothing is computed from times less certain than this: errors grow with the number of ranks. */
export const certain = 0.1

/** The share of tokens that have an expert on a given one of so many ranks, when each expert is as likely. */
export function touched({ topk }: Setting, ranks: number): number {
  return 1 - (1 - 1 / ranks) ** topk
}

/** Bytes that a rank puts on its link in one call. */
function bytesOf(setting: Setting, scheme: string, ranks: number): number {
  const { tokens, hidden, bytes } = setting
  // A ring sends all but its own part twice, in float32; an all-to-all sends the rows there and their sums back.
  if (scheme === 'all-reduce') return 2 * (1 - 1 / ranks) * tokens * hidden * 4
  return 2 * (tokens / ranks) * touched(setting, ranks) * (ranks - 1) * hidden * bytes
}

/**
 * Rows of a table. Communication is latency + bytes / bandwidth, both from the job of two ranks, the latency growing
 * with the steps that a ring, or an exchange with every rank, takes. Experts are fitted through one rank and two.
 */
export function extrapolate(setting: Setting, found: Measured[], sizes: number[]): string[][] {
  const rows: string[][] = []
  for (const scheme of ['all-reduce', 'all-to-all']) {
    const of = (ranks: number) => found.find((each) => each.scheme === scheme && each.ranks === ranks)
    const [one, two] = [of(1), of(2)]
    if (one === undefined || two === undefined || Math.max(one.error, two.error) > certain) continue
    // A part of the experts' time is every rank's, a part is shared out; what is neither experts nor collectives stays.
    const shared = Math.max(0, 2 * (one.experts - two.experts))
    const fixed = Math.max(0, one.experts - shared)
    const rest = Math.max(0, two.layer - two.experts - two.communication)
    const perByte = Math.max(0, two.communication - two.latency) / bytesOf(setting, scheme, 2)
    for (const ranks of sizes) {
      const steps = scheme === 'all-reduce' ? 2 * (ranks - 1) : ranks - 1
      const measuredSteps = scheme === 'all-reduce' ? 2 : 1
      const communication = (two.latency * steps) / measuredSteps + bytesOf(setting, scheme, ranks) * perByte
      const experts = fixed + shared / ranks
      const times = [experts, communication, rest + experts + communication, rest + Math.max(experts, communication)]
      rows.push([scheme, String(ranks), ...times.map((ms) => ms.toFixed(2)), of(ranks)?.layer.toFixed(2) ?? ''])
    }
  }
  return rows
}
