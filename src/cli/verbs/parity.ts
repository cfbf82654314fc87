import { writeFileSync } from 'node:fs'
import type { Command } from 'commander'
import { devices } from '../../device.js'
import type { DType } from '../../dtype.js'
import { availableBackends, backendNames } from '../../parity/backends.js'
import type { Case, GridOptions } from '../../parity/case.js'
import { junitOf } from '../../parity/junit.js'
import { presets } from '../../parity/presets.js'
import { referenceNames } from '../../parity/references.js'
import { succeeded } from '../../parity/result.js'
import { loadCases, runParity } from '../../parity/run.js'
import { summaryOf, tableOf } from '../../parity/table.js'
import { startPython } from '../../python/start.js'
import { Progress } from '../progress.js'
import { exitCodes, namesOf, usageError, type Verb, wholeNumbers } from '../verb.js'

interface Options {
  op?: string[]
  backend?: string[]
  reference?: string[]
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
  interpreterBudget: number[]
  list?: boolean
  json?: string
  junit?: string
  quiet?: boolean
}

const collect = (value: string, previous: string[] = []) => [...previous, value]

const verb: Verb = {
  name: 'parity',
  summary: 'compare every kernel with its references; exit 0 when all pass and every control is detected',
  configure(command: Command) {
    command
      .option('--op <names>', 'ops, separated by commas', (text) => text.split(','))
      .option('--backend <names>', `all, or ${backendNames.join(', ')}`, namesOf('--backend', backendNames))
      .option('--reference <names>', `all, or ${referenceNames.join(', ')}`, namesOf('--reference', referenceNames))
      .option(
        '--dtype <names>',
        'float32, float16, bfloat16',
        namesOf('--dtype', ['float32', 'float16', 'bfloat16'] as const),
      )
      .option('--tokens <counts>', 'tokens T', wholeNumbers('--tokens', 0))
      .option(
        '--preset <names>',
        `all, or ${Object.keys(presets).join(', ')}`,
        namesOf('--preset', Object.keys(presets)),
      )
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
      .option(
        '--interpreter-budget <steps>',
        'largest case for interpreted Triton',
        wholeNumbers('--interpreter-budget', 0),
        [2500],
      )
      .option('--list', 'print the names of the cases and stop')
      .option('--json <file>', 'write the report')
      .option('--junit <file>', 'write the report as JUnit XML')
      .option('--quiet', 'no progress')
  },
  async run(options: Options) {
    const cases = await selectCases(options)
    if (options.list) {
      for (const { name } of cases) console.log(name)
      return exitCodes.passed
    }
    const backends = availableBackends(options.backend ?? backendNames)
    if (backends.length === 0) {
      console.error(`epmoe: none of ${options.backend?.join(', ')} is here; epmoe doctor says why`)
      return exitCodes.environment
    }
    // Triton decides how to run when it is imported: without a GPU, its kernels are interpreted.
    if (devices().length === 1) process.env['TRITON_INTERPRET'] ??= '1'
    const progress = new Progress(options.quiet === true)
    const report = runParity({
      cases,
      backends,
      references: options.reference ?? [...referenceNames],
      python: startPython(),
      interpreterBudget: options.interpreterBudget[0]!,
      controlCases: await controlCases(cases),
      onCase: (name, index, total) => progress.show(index, total, name),
    })
    progress.end()
    console.log(tableOf(report))
    console.log(summaryOf(report))
    if (options.json !== undefined) writeFileSync(options.json, `${JSON.stringify(report, null, 1)}\n`)
    if (options.junit !== undefined) writeFileSync(options.junit, junitOf(report))
    return succeeded(report) ? exitCodes.passed : exitCodes.failed
  },
}
export default verb

async function selectCases(options: Options): Promise<Case[]> {
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
function gridOf(options: Options): GridOptions | undefined {
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

/** One standard case of each op and dtype in the run, for when the chosen ones are too small to be spoiled. */
async function controlCases(cases: Case[]): Promise<Case[]> {
  const standard = (await loadCases()).flatMap((each) => each.standard())
  const wanted = new Set(cases.map(({ op, dtype }) => `${op}/${dtype}`))
  return [...wanted].flatMap(
    (key) => standard.find((each) => `${each.op}/${each.dtype}` === key && each.axes['T']! > 8) ?? [],
  )
}

function patternOf(option: string, text: string | undefined): RegExp | undefined {
  if (text === undefined) return undefined
  try {
    return new RegExp(text)
  } catch {
    throw usageError(option, 'a regular expression', text)
  }
}
