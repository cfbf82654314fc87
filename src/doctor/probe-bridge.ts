// Run in a process of its own: Python in this process, and an op on torch tensors.

import { postReorder } from '../generated/ops.js'
import { startPython } from '../python/start.js'
import { Tensor } from '../tensor.js'
import { marker } from './outcome.js'

const python = startPython()
const torch = python.import('torch')
const make = (expression: string) => python.eval(expression, { torch })
const output = make('torch.full((1, 8), float("nan"))')
postReorder({
  downOutput: make('torch.arange(16, dtype=torch.float32).reshape(2, 8)'),
  output,
  src2dst: make('torch.tensor([1, 0], dtype=torch.int32)'),
  topkWeights: make('torch.tensor([[0.5, 0.25]])'),
})
const expected = Array.from({ length: 8 }, (_, column) => 0.5 * (8 + column) + 0.25 * column)
const received = Array.from(Tensor.fromTorch(output).data as Float32Array)
if (String(received) !== String(expected))
  throw new Error(`postReorder gave ${String(received)} instead of ${String(expected)}`)
console.log(marker + JSON.stringify(`Python ${python.version} in this process, postReorder on torch tensors is right`))
