import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import type { Device, PyRef } from 'epmoe'
import { type MoeLayerOptions, moeLayer } from '../../src/moe-layer.js'
import { allowedError, reference } from '../helpers/golden.js'
import { evaluate, python, valueOf } from '../helpers/python.js'

/** Why there is nothing to compare with here; undefined when there is. */
export function whyNot(): string | undefined {
  let version: string
  try {
    version = python.import('importlib.metadata').method('version', 'transformers').toJS() as string
  } catch {
    return `transformers is not installed for ${python.executable}`
  }
  return Number.parseInt(version, 10) >= 5 ? undefined : `transformers ${version} is older than 5`
}

export type Dtype = 'float32' | 'bfloat16'

/** A block as test/transformers/blocks.py describes it. */
export interface Block {
  name: string
  /** Experts in all. */
  experts: number
  options: MoeLayerOptions
  input: { hiddenStates: PyRef; topkIds: PyRef; topkWeights: PyRef }
  /** What one rank adds. */
  added: { sharedOutput?: PyRef; residual?: PyRef }
  exact: PyRef
  /** The block's own error against the float64 result, by the way transformers runs its experts. */
  own: Record<string, number>
  /** The errors of what torch's matrix products allow at best, by their shapes: test/helpers/moe_layer.py. */
  attainable: number[]
  /** Elements in the output. */
  count: number
}

let module: PyRef | undefined

function blocks(): PyRef {
  const file = fileURLToPath(new URL('blocks.py', import.meta.url))
  module ??= python.exec(readFileSync(file, 'utf8'), file)
  return module
}

export const blockNames = ['Mixtral', 'Qwen3-MoE', 'DeepSeek-V3', 'gpt-oss']

export function makeBlock(name: string, dtype: Dtype, device: Device, withResidual = false): Block {
  const made = blocks().method('make', name, dtype, device, withResidual)
  const has = (key: string) => valueOf('b[k] is not None', { b: made, k: key }) as boolean
  const optional = (key: string) => (has(key) ? made.item(key) : undefined)
  const [w13Bias, w2Bias, shared, residual] = ['w13_bias', 'w2_bias', 'shared', 'residual'].map(optional)
  const w13 = made.item('w13')
  const exact = made.item('exact')
  const own = Object.entries(
    valueOf('{k: error(v, b["exact"]) for k, v in b["own"].items()}', {
      b: made,
      error: reference.get('error'),
    }) as object,
  ) as [string, number][]
  const options = {
    w13,
    w2: made.item('w2'),
    w13Bias,
    w2Bias,
    activation: made.item('activation').toJS() as 'silu' | 'swigluoai',
    routedScalingFactor: made.item('factor').toJS() as number,
  }
  const { activation, routedScalingFactor } = options
  const attainable = reference.method('attainable', made, activation, w13Bias !== undefined, routedScalingFactor, true)
  return {
    name: withResidual ? `${name} + residual` : name,
    experts: w13.length,
    options,
    input: { hiddenStates: made.item('hidden'), topkIds: made.item('ids'), topkWeights: made.item('weights') },
    added: { ...(shared && { sharedOutput: shared }), ...(residual && { residual }) },
    exact,
    own: Object.fromEntries(own),
    attainable: [...attainable].map((each) => errorTo(exact, each)),
    count: valueOf('x.numel()', { x: exact }) as number,
  }
}

/**
 * The block's experts through epmoe, split over so many ranks; each rank has its slice of the weights, rounds its output
 * to the activations' dtype, and the outputs are summed in float64. `change` spoils a rank's options, for controls.
 */
export function runBlock(block: Block, ranks = 1, change = (options: MoeLayerOptions) => options): PyRef {
  const local = block.experts / ranks
  const outputs = Array.from({ length: ranks }, (_, rank) => {
    const startExpertId = rank * local
    const part = (weights: PyRef | undefined) =>
      weights && evaluate('x[a:b]', { x: weights, a: startExpertId, b: startExpertId + local })
    const { w13, w2, w13Bias, w2Bias, ...rest } = block.options
    const options = { ...rest, w13: part(w13)!, w2: part(w2)!, w13Bias: part(w13Bias), w2Bias: part(w2Bias) }
    using layer = moeLayer(change({ ...options, startExpertId, numExperts: block.experts }))
    return layer.forward({ ...block.input, ...(rank === 0 ? block.added : {}) })
  })
  return evaluate('sum(x.double() for x in outputs)', { outputs })
}

/** Relative to the float64 result, in the L2 norm. */
export function errorOf(block: Block, output: PyRef): number {
  return errorTo(block.exact, output)
}

function errorTo(exact: PyRef, output: PyRef): number {
  return reference.method('error', output, exact).toJS() as number
}

/** The largest error that counts as no worse than the block's own, in the better of transformers' two ways. */
export function allowed({ own, attainable, count }: Block): number {
  return allowedError(Math.min(...Object.values(own)), attainable, count)
}

export function versions(): string {
  const version = (name: string) => python.import(name).get('__version__').toJS() as string
  return ['torch', 'transformers'].map((name) => `${name} ${version(name)}`).join(', ')
}
