import type { Command } from 'commander'
import type { DType } from '../dtype.js'
import type { Case, GridOptions } from '../parity/case.js'
import { presets } from '../parity/presets.js'
import { loadCases } from '../parity/run.js'
import { namesOf, usageError, wholeNumbers } from './verb.js'

/** How a command line chooses cases; the same for every verb that runs some. */
export interface CaseOptions {
  op?: string[]
  dtype?: DType[]
  tokens?: number[]
  hidden?: number[]
  topk?: number[]
  experts?: number[]
  ep?: number[]
  ids?: ('int32' | 'int64')[]
  weights?: ('float32' | 'same')[]
  routing?: ('uniform' | 'skewed')[]
  preset?: string[]
  seed: number[]
  case?: string[]
  only?: string
  skip?: string
}

const collect = (value: string, previous: string[] = []) => [...previous, value]

export function caseOptions(command: Command): Command {
  return command
    .option('--op <names>', 'ops, separated by commas', (text) => text.split(','))
    .option(
      '--dtype <names>',
      'float32, float16, bfloat16',
      namesOf('--dtype', ['float32', 'float16', 'bfloat16'] as const),
    )
    .option('--tokens <counts>', 'tokens T', wholeNumbers('--tokens', 0))
    .option('--preset <names>', `all, or ${Object.keys(presets).join(', ')}`, namesOf('--preset', Object.keys(presets)))
    .option('--hidden <sizes>', 'hidden sizes H, without a preset', wholeNumbers('--hidden', 1))
    .option('--topk <counts>', 'experts a token K, without a preset', wholeNumbers('--topk', 1))
    .option('--experts <counts>', 'experts E, without a preset', wholeNumbers('--experts', 1))
    .option('--ep <counts>', 'ranks the experts are split over', wholeNumbers('--ep', 1))
    .option('--ids <dtypes>', 'index dtypes: int32, int64', namesOf('--ids', ['int32', 'int64'] as const))
    .option('--weights <dtypes>', 'weight dtypes: float32, same', namesOf('--weights', ['float32', 'same'] as const))
    .option('--routing <kinds>', 'uniform, skewed', namesOf('--routing', ['uniform', 'skewed'] as const))
    .option('--seed <number>', 'seed of the data', wholeNumbers('--seed', 0), [1])
    .option('--case <name>', 'a case by its printed name; may be repeated', collect)
    .option('--only <pattern>', 'cases whose name matches this regular expression')
    .option('--skip <pattern>', 'all but these')
}

/** The cases that options ask for; throws a usage error when there are none. */
export async function selectCases(options: CaseOptions): Promise<Case[]> {
  const known = await loadCases()
  for (const op of options.op ?? []) {
    if (!known.some((each) => each.op === op)) throw usageError('--op', known.map((each) => each.op).join(', '), op)
  }
  const chosen = known.filter(({ op }) => options.op?.includes(op) ?? true)
  const named = (options.case ?? []).map((name) => {
    const found = known.map((each) => each.parse(name)).find((each) => each !== undefined)
    if (found === undefined) throw usageError('--case', 'a name that --list prints', name)
    return found
  })
  if (named.length > 0) return named
  const grid = gridOf(options)
  const cases = chosen.flatMap((each) => (grid === undefined ? each.standard() : each.grid(grid)))
  const only = patternOf('--only', options.only)
  const skip = patternOf('--skip', options.skip)
  const dtypes = options.dtype
  const selected = cases.filter(
    ({ name, dtype }) =>
      (only?.test(name) ?? true) &&
      !(skip?.test(name) ?? false) &&
      (grid !== undefined || (dtypes?.includes(dtype) ?? true)),
  )
  if (selected.length === 0) throw usageError('--only', 'a selection that leaves a case', 'none left')
  return selected
}

/** Any axis on the command line asks for the cross product instead of the standard cases. */
function gridOf(options: CaseOptions): GridOptions | undefined {
  const axes = [
    options.tokens,
    options.preset,
    options.hidden,
    options.topk,
    options.experts,
    options.ep,
    options.ids,
    options.weights,
    options.routing,
  ]
  if (axes.every((axis) => axis === undefined)) return undefined
  return {
    tokens: options.tokens ?? [1, 7],
    presets: options.preset ?? (options.hidden === undefined ? Object.keys(presets) : []),
    hidden: options.hidden ?? [],
    topk: options.topk ?? [8],
    experts: options.experts ?? [64],
    dtypes: options.dtype ?? ['float32', 'float16', 'bfloat16'],
    ep: options.ep ?? [1, 8],
    idsDtypes: options.ids ?? ['int32', 'int64'],
    weightsDtypes: options.weights ?? ['float32', 'same'],
    routings: options.routing ?? ['uniform'],
    seed: options.seed[0]!,
  }
}

function patternOf(option: string, text: string | undefined): RegExp | undefined {
  if (text === undefined) return undefined
  try {
    return new RegExp(text)
  } catch {
    throw usageError(option, 'a regular expression', text)
  }
}
