import anyTest, { type TestFn } from 'ava'
import type { MoeLayerOptions, PyRef } from 'epmoe'
import { testDevices } from './helpers/devices.js'
import { evaluate, python } from './helpers/python.js'
import {
  allowed,
  type Block,
  blockNames,
  type Dtype,
  errorOf,
  makeBlock,
  runBlock,
  whyNot,
} from './transformers/measure.js'

// The layer against the blocks that Hugging Face transformers has for whole models, with random weights. What is demanded
// is the golden tier: epmoe's error against the block's experts in float64 is no worse than the block's own.
const reason = whyNot()
const test = (reason === undefined ? anyTest : anyTest.skip) as TestFn
const dtypes: Dtype[] = ['float32', 'bfloat16']

if (reason !== undefined) anyTest(`transformers' blocks are not compared: ${reason}`, (t) => t.pass())

for (const device of testDevices) {
  for (const dtype of dtypes) {
    for (const name of blockNames) {
      test(`${name} in ${dtype} on ${device}, experts on 1, 2, 4 and 8 ranks`, (t) => {
        const block = makeBlock(name, dtype, device)
        for (const ranks of [1, 2, 4, 8]) {
          const error = errorOf(block, runBlock(block, ranks))
          t.true(error <= allowed(block), `${ranks} ranks: ${error}, ${JSON.stringify(block.own)}`)
        }
      })
    }

    test(`DeepSeek-V3 with the residual in ${dtype} on ${device}`, (t) => {
      const block = makeBlock('DeepSeek-V3', dtype, device, true)
      for (const ranks of [1, 8]) t.true(errorOf(block, runBlock(block, ranks)) <= allowed(block))
    })

    test(`spoilt layers are told from right ones in ${dtype} on ${device}`, (t) => {
      const block = makeBlock('gpt-oss', dtype, device)
      const told = (name: string, output: PyRef) => {
        const times = errorOf(block, output) / allowed(block)
        t.log(`${name}: ${times.toPrecision(3)} of what is allowed`)
        t.true(times > 1, name)
      }
      const spoils = { ...controls(block), ...(dtype === 'float32' && finerControls()) }
      for (const [name, spoil] of Object.entries(spoils)) told(name, runBlock(block, 1, spoil))
      told('zeros', evaluate('x * 0', { x: block.exact }))
    })
  }
}

function controls({ experts }: Block): Record<string, (options: MoeLayerOptions) => MoeLayerOptions> {
  const swapped = (x: unknown) => evaluate(`x[[1, 0, *range(2, ${experts})]]`, { x })
  return {
    'a wrong expert range': (options) => ({ ...options, startExpertId: 1, numExperts: experts + 1 }),
    'two experts whose first matrices are swapped': (options) => ({ ...options, w13: swapped(options.w13) }),
    'two experts whose second matrices are swapped': (options) => ({ ...options, w2: swapped(options.w2) }),
    'no bias': (options) => ({ ...options, w2Bias: undefined }),
    'another activation': (options) => ({ ...options, activation: 'silu' }),
    'a factor that is off by 1 %': (options) => ({ ...options, routedScalingFactor: 1.01 }),
  }
}

/** What float32 alone tells. */
function finerControls(): Record<string, (options: MoeLayerOptions) => MoeLayerOptions> {
  const rounded = evaluate('lambda f: lambda rows: f(rows).bfloat16().float()')
  const activation = rounded.call(python.import('epmoe.moe').get('swiglu_oai'))
  return {
    'an activation rounded to bfloat16': (options) => ({ ...options, activation }),
    'a factor that is off by a millionth': (options) => ({ ...options, routedScalingFactor: 1 + 1e-6 }),
  }
}
