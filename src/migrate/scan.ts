import { lstatSync } from 'node:fs'
import { EpmoeError } from '../errors.js'
import { job } from '../python/executor.js'
import { startPython } from '../python/start.js'

export interface ScanOptions {
  /**
   * `report` (default) looks only; `write` rewrites every site that nothing stands against, as
   * `drop_in(kernel)[grid](…)` of Python's epmoe.shim; `revert` takes that back, byte for byte.
   */
  action?: 'report' | 'write' | 'revert' | undefined
  /** Adds unified diffs of the changes: those made, or with `report` those that `write` would make. */
  diff?: boolean | undefined
  /**
   * The file with SGLang's kernels, or the folder of its package, for imports from `sglang` that the scanned files do
   * not define. Default: EPMOE_SGLANG, or what is installed beside Python.
   */
  sglang?: string | undefined
  /** Gives the scan up; files are written whole or not at all. */
  signal?: AbortSignal | undefined
}

/** A place where a kernel is launched (`kernel[grid](…)`), a helper is called, or either is handed on. */
export interface ScanSite {
  file: string
  /** From 1 on, as is `column`, which counts characters. */
  line: number
  column: number
  /** SGLang's name: `post_reorder_triton_kernel`. Several, joined by ` or `, where it may be any of them. */
  kernel: string
  kind: 'launch' | 'call' | 'partial' | 'value'
  /** The expression that stands for the kernel there, as it is written: `kernels.post_reorder_triton_kernel`. */
  callee: string
  /** Where it is imported from, as it is written; empty where it is not. */
  module: string
  /** The file that defines it; empty where that is not seen, and the call alone tells the signature. */
  definition: string
  /** The op of epmoe that takes its place: `post_reorder`. */
  op: string
  /** post_reorder's generation, A to D; `C or D` where the call does not tell. Empty for kernels that have but one. */
  generation: string
  arguments: {
    /** The kernel's parameter, as its definition spells it. */
    parameter: string
    /** epmoe's argument; null for what it reads off the tensors' shapes or needs not know. */
    argument: string | null
    /** The source text, in one line. */
    value: string
  }[]
  state: 'ready' | 'blocked' | 'migrated'
  /** What stands against rewriting it. */
  blockers: { code: ScanBlocker; reason: string }[]
  notes: string[]
}

export type ScanBlocker =
  | 'arguments'
  | 'device-code'
  | 'f-string'
  | 'generation-unknown'
  | 'grid'
  | 'known-wrong'
  | 'partial'
  | 'rebound'
  | 'refused-value'
  | 'several-kernels'
  | 'star-arguments'
  | 'taken-as-value'
  | 'unbound'
  | 'unknown-signature'

/** A file that was not scanned, or not written. `harmless`: no site can be missed by it. */
export interface ScanProblem {
  file: string
  kind:
    | 'does-not-parse'
    | 'not-a-file'
    | 'not-text'
    | 'not-written'
    | 'symlink-loop'
    | 'too-large'
    | 'unreadable'
    | 'vanished'
  reason: string
  harmless: boolean
}

export interface ScanReport {
  schema: 'epmoe.scan/1'
  /** Only files that mention a kernel's name are parsed. */
  files: { seen: number; parsed: number }
  seconds: number
  /** After what was written. */
  sites: ScanSite[]
  problems: ScanProblem[]
  changes: { file: string; sites: number; written: boolean; diff?: string }[]
  summary: Record<ScanSite['state'], number>
}

/**
 * Finds launches of SGLang's EP-MoE Triton kernels in Python files and folders, with Python's own parser; nothing that
 * is scanned is imported or run. Works on Python's executor thread.
 */
export async function scan(paths: string | readonly string[], options: ScanOptions = {}): Promise<ScanReport> {
  const { action = 'report', diff = false, sglang, signal } = options
  const every = typeof paths === 'string' ? [paths] : [...paths]
  if (every.length === 0) throw usage('paths', 'files or folders', 'none')
  for (const path of every) mustExist('paths', path)
  if (sglang !== undefined) mustExist('sglang', sglang)
  if (!['report', 'write', 'revert'].includes(action)) throw usage('action', 'report, write or revert', action)
  using module = await startPython().importAsync('epmoe.migrate.scan', { signal })
  const request = JSON.stringify({ paths: every, action, diff, sglang: sglang ?? null })
  using result = await module.methodAsync('scan_json', request, job({ signal }))
  return JSON.parse(result.toJS() as string) as ScanReport
}

/** Whether no launch is left to be rewritten, and no file was passed over that may hold one. */
export function isMigrated({ sites, problems }: ScanReport): boolean {
  return sites.every(({ state }) => state === 'migrated') && problems.every(({ harmless }) => harmless)
}

function mustExist(argument: string, path: string): void {
  try {
    lstatSync(path)
  } catch {
    throw usage(argument, 'files or folders that exist', path)
  }
}

function usage(argument: string, expected: string, received: string): EpmoeError {
  return new EpmoeError({ code: 'ERR_USAGE', op: 'scan', argument, expected, received })
}
