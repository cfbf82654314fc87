// Prints the errors of transformers' blocks and of epmoe's layer against float64:
// npx tsx --conditions=epmoe-source test/transformers/table.ts
import { testDevices } from '../helpers/devices.js'
import { allowed, blockNames, type Dtype, errorOf, makeBlock, runBlock, versions, whyNot } from './measure.js'

const reason = whyNot()
if (reason !== undefined) throw new Error(reason)

const rankCounts = [1, 2, 4, 8]
const cell = (value: number) => value.toExponential(3)
const rows: string[][] = [
  ['block', 'dtype', 'device', 'eager', 'grouped_mm', 'products', ...rankCounts.map((n) => `epmoe, ${n}`), ''],
]
for (const device of testDevices) {
  for (const dtype of ['float32', 'bfloat16'] satisfies Dtype[]) {
    for (const name of blockNames) {
      for (const withResidual of name === 'DeepSeek-V3' ? [false, true] : [false]) {
        const block = makeBlock(name, dtype, device, withResidual)
        const errors = rankCounts.map((ranks) => errorOf(block, runBlock(block, ranks)))
        const passed = errors.every((error) => error <= allowed(block))
        const own = ['eager', 'grouped_mm'].map((way) => cell(block.own[way] ?? Number.NaN))
        const products = [Math.min(...block.attainable), Math.max(...block.attainable)].map(cell).join(' to ')
        rows.push([block.name, dtype, device, ...own, products, ...errors.map(cell), passed ? 'passed' : 'FAILED'])
        if (!passed) process.exitCode = 1
      }
    }
  }
}
console.log(`relative L2 error against float64; epmoe's experts on 1, 2, 4, 8 ranks; ${versions()}`)
console.log("products: what torch's matrix products allow at best, by their shapes\n")
for (const row of rows) console.log(`| ${row.join(' | ')} |`)
