// Offsets beyond 2^31 elements. Memory is only reserved: what no call touches is never there.
import test from 'ava'
import { epGather, preReorder, siluAndMul, Tensor } from 'epmoe'

const inTurn = test.serial

inTurn('preReorder writes rows beyond 2^31 elements', (t) => {
  const [rows, H] = [300_000, 7168]
  using output = Tensor.empty([rows, H], { dtype: 'float8_e4m3fn' })
  using input = Tensor.from(
    Float32Array.from({ length: H }, (_, i) => (i % 16) - 8),
    [1, H],
  )
  using src2dst = Tensor.from(new Int32Array([rows - 1, 3]), [2])
  preReorder({ input, gateupInput: output, src2dst })
  t.true((rows - 1) * H > 2 ** 31)
  const first = output.view([H], 3 * H).data
  const last = output.view([H], (rows - 1) * H).data
  t.is(first[9], 0x38) // 1.0
  t.deepEqual(last, first)
})

inTurn('siluAndMul reads and writes rows beyond 2^31 elements', (t) => {
  const [rows, I] = [300_000, 7168]
  using input = Tensor.empty([rows, 2 * I], { dtype: 'bfloat16' })
  using output = Tensor.empty([rows, I], { dtype: 'bfloat16' })
  const ids = new Int32Array(rows).fill(-1)
  ids[rows - 1] = 0
  using reorderTopkIds = Tensor.from(ids, [rows])
  input.view([2 * I], (rows - 1) * 2 * I).data.fill(0x4000 as never) // 2.0
  siluAndMul({ gateupOutput: input, downInput: output, reorderTopkIds })
  const expected = (2 / (1 + Math.exp(-2))) * 2
  const bits = Number(output.view([I], (rows - 1) * I).data[I - 1])
  const value = new Float32Array(new Uint32Array([bits << 16]).buffer)[0] ?? 0
  t.true(Math.abs(value - expected) <= expected * 2 ** -8)
})

inTurn('epGather reads rows beyond 2^31 elements', (t) => {
  const [rows, H] = [300_000, 7168]
  using inputTensor = Tensor.empty([rows, H], { dtype: 'bfloat16' })
  inputTensor.view([H], (rows - 1) * H).data.fill(0x3f80 as never) // 1.0
  using recvTopkIds = Tensor.from(new Int32Array([0]), [1, 1])
  using recvTopkWeight = Tensor.from(new Float32Array([2]), [1, 1])
  using inputIndex = Tensor.from(new Int32Array([rows - 1]), [1, 1])
  using outputTensor = Tensor.empty([1, H], { dtype: 'bfloat16' })
  epGather({ inputTensor, recvTopkIds, recvTopkWeight, inputIndex, outputTensor })
  t.is(outputTensor.data[H - 1], 0x4000)
})
