import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { MessageChannel } from 'node:worker_threads'
import test from 'ava'
import { type DType, EpmoeError, postReorder, stats, Tensor, type TypedArray } from 'epmoe'
import { validCall } from './helpers/call.js'
import { gpu, testDevices } from './helpers/devices.js'

const dtypes: [DType, number][] = [
  ['float32', 4],
  ['float16', 2],
  ['bfloat16', 2],
  ['float8_e4m3fn', 1],
  ['int32', 4],
  ['int64', 8],
  ['uint8', 1],
  ['float64', 8],
]

for (const device of testDevices) {
  for (const [dtype, itemsize] of dtypes) {
    test(`empty ${dtype} on ${device}: fields are those of torch`, (t) => {
      using tensor = Tensor.empty([2, 3, 4], { dtype, device })
      t.deepEqual([...tensor.shape], [2, 3, 4])
      t.deepEqual([...tensor.strides], [12, 4, 1])
      t.is(tensor.dtype, dtype)
      t.is(tensor.device, device)
      t.is(tensor.nbytes, 24 * itemsize)
      t.is(tensor.numel, 24)
      t.not(tensor.dataPtr, 0n)
    })
  }

  test(`zeros, to() and toHost() on ${device} keep every element`, async (t) => {
    using zeros = Tensor.zeros([5], { device })
    using host = await zeros.toHost()
    t.deepEqual(Array.from(host.data as Float32Array), [0, 0, 0, 0, 0])
    using source = Tensor.from(new Int32Array([3, 1, 4, 1, 5]))
    using there = source.to(device)
    using back = there.toHostSync()
    t.deepEqual(Array.from(back.data as Int32Array), [3, 1, 4, 1, 5])
    t.not(back.dataPtr, source.dataPtr)
  })

  test(`stats() counts tensors and bytes on ${device}`, (t) => {
    const kind = device === 'cpu' ? 'cpu' : 'cuda'
    const before = stats()[kind]
    const tensor = Tensor.empty([1000], { device })
    const view = tensor.view([10], 5)
    t.deepEqual(stats()[kind], { tensors: before.tensors + 2, bytes: before.bytes + 4000 })
    tensor.dispose()
    t.deepEqual(stats()[kind], { tensors: before.tensors + 1, bytes: before.bytes + 4000 })
    view.dispose()
    t.deepEqual(stats()[kind], before)
  })
}

test('a tensor over a TypedArray is the same memory', (t) => {
  const array = new Float32Array([1, 2, 3, 4, 5, 6])
  using tensor = Tensor.from(array.subarray(2), [2, 2])
  array[2] = 30
  const data = tensor.data as Float32Array
  t.deepEqual(Array.from(data), [30, 4, 5, 6])
  data[3] = 60
  t.is(array[5], 60)
})

test('a view is a part of the same memory', (t) => {
  using tensor = Tensor.from(new Float32Array([0, 1, 2, 3, 4, 5]))
  using view = tensor.view([2, 2], 1)
  t.is(view.dataPtr, tensor.dataPtr + 4n)
  ;(view.data as Float32Array)[0] = 10
  t.deepEqual(Array.from(tensor.data as Float32Array), [0, 10, 2, 3, 4, 5])
})

test('memory of epmoe is aligned, and its data aliases itself', (t) => {
  using tensor = Tensor.empty([3])
  t.is(tensor.dataPtr % 64n, 0n)
  ;(tensor.data as Float32Array).set([1, 2, 3])
  t.deepEqual(Array.from(tensor.data as Float32Array), [1, 2, 3])
})

test('dispose() empties the typed arrays that were handed out, and may be repeated', (t) => {
  const tensor = Tensor.zeros([4])
  const { data } = tensor
  tensor.dispose()
  tensor.dispose()
  t.true(tensor.disposed)
  t.is(data.length, 0)
  for (const use of [() => tensor.data, () => tensor.view([1]), () => tensor.to('cpu'), () => tensor.toHostSync()]) {
    t.is(t.throws(use, { instanceOf: EpmoeError })?.code, 'ERR_DISPOSED')
  }
})

test('an ArrayBuffer that was transferred away is noticed', (t) => {
  const array = new Float32Array(8)
  const tensor = Tensor.from(array)
  const { port1, port2 } = new MessageChannel()
  port1.postMessage(array.buffer, [array.buffer])
  port1.close()
  port2.close()
  t.is(t.throws(() => tensor.data, { instanceOf: EpmoeError })?.code, 'ERR_DISPOSED')
})

test('a resizable buffer is refused', (t) => {
  const Resizable = ArrayBuffer as unknown as new (length: number, options: { maxByteLength: number }) => ArrayBuffer
  const error = t.throws(() => Tensor.from(new Uint8Array(new Resizable(8, { maxByteLength: 16 }))), {
    instanceOf: EpmoeError,
  })
  t.is(error?.code, 'ERR_UNSUPPORTED_TENSOR')
})

const badShapes: [string, unknown][] = [
  ['negative', [2, -1]],
  ['fractional', [1.5]],
  ['NaN', [Number.NaN]],
  ['not an array', 3],
  ['of strings', ['2']],
  ['of rank 17', new Array(17).fill(1)],
]
for (const [what, shape] of badShapes) {
  test(`a shape that is ${what} is refused`, (t) => {
    const error = t.throws(() => Tensor.empty(shape as number[]), { instanceOf: EpmoeError })
    t.is(error?.code, 'ERR_SHAPE')
    t.is(error?.argument, 'shape')
  })
}

test('what no machine can allocate is an error, not a crash', (t) => {
  for (const shape of [[2 ** 52], [2 ** 30, 2 ** 20], [2 ** 40, 2 ** 40]]) {
    t.is(t.throws(() => Tensor.empty(shape), { instanceOf: EpmoeError })?.code, 'ERR_OUT_OF_MEMORY')
  }
})

test('arrays need a dtype that their elements can have', (t) => {
  for (const [array, options] of [
    [new Uint16Array(2), {}],
    [new Float32Array(2), { dtype: 'bfloat16' }],
    [new Int8Array(2), {}],
    [[1, 2], {}],
    [null, {}],
  ] as unknown as [TypedArray, { dtype?: DType }][]) {
    t.is(t.throws(() => Tensor.from(array, undefined, options), { instanceOf: EpmoeError })?.code, 'ERR_DTYPE')
  }
  t.is(t.throws(() => Tensor.from(new Float32Array(3), [2, 2]), { instanceOf: EpmoeError })?.code, 'ERR_SHAPE')
})

test('unknown devices and dtypes are named', (t) => {
  t.is(t.throws(() => Tensor.empty([1], { device: 'tpu' as 'cpu' }), { instanceOf: EpmoeError })?.received, '"tpu"')
  t.is(t.throws(() => Tensor.empty([1], { dtype: 'int4' as 'int32' }), { instanceOf: EpmoeError })?.received, '"int4"')
  const absent = t.throws(() => Tensor.empty([1], { device: 'cuda:63' }), { instanceOf: EpmoeError })
  t.true(['ERR_NO_CUDA', 'ERR_DEVICE'].includes(absent?.code ?? ''), absent?.code)
})

test('copies neither convert nor broadcast', (t) => {
  using tensor = Tensor.zeros([4])
  t.is(t.throws(() => tensor.copyFrom(Tensor.zeros([5])), { instanceOf: EpmoeError })?.code, 'ERR_SHAPE')
  t.is(
    t.throws(() => tensor.copyFrom(Tensor.zeros([4], { dtype: 'int32' })), { instanceOf: EpmoeError })?.code,
    'ERR_DTYPE',
  )
  t.is(t.throws(() => tensor.copyFrom({} as Tensor), { instanceOf: EpmoeError })?.code, 'ERR_NOT_A_TENSOR')
  t.is(t.throws(() => tensor.view([2, 2], 1), { instanceOf: EpmoeError })?.code, 'ERR_SHAPE')
})

setFlagsFromString('--expose-gc')
const collect = runInNewContext('gc') as () => void

test.serial('tensors nobody holds are collected', async (t) => {
  const before = stats().cpu.tensors
  for (let i = 0; i < 100; i++) Tensor.empty([10])
  for (let i = 0; i < 50 && stats().cpu.tensors > before; i++) {
    collect()
    await new Promise((resolve) => setTimeout(resolve, 10))
  }
  t.true(stats().cpu.tensors <= before, `${stats().cpu.tensors} live, ${before} before`)
})

test.serial('data outlives a tensor that was collected', async (t) => {
  const before = stats().cpu.tensors
  const make = () => {
    const tensor = Tensor.zeros([1000])
    return tensor.view([500], 500).data as Float32Array
  }
  const data = make()
  data.fill(7)
  for (let i = 0; i < 50 && stats().cpu.tensors > before; i++) {
    collect()
    await new Promise((resolve) => setTimeout(resolve, 10))
  }
  t.true(stats().cpu.tensors <= before)
  for (let i = 0; i < 100; i++) Tensor.zeros([1000]).dispose()
  t.is(data.length, 500)
  t.true(data.every((value) => value === 7))
})

if (gpu !== undefined) {
  test('GPU tensors have no data, and say what to do', (t) => {
    using tensor = Tensor.zeros([2], { device: gpu as 'cuda:0' })
    const error = t.throws(() => tensor.data, { instanceOf: EpmoeError })
    t.is(error?.code, 'ERR_DEVICE')
    t.regex(error?.hint ?? '', /toHost/)
  })
}

test('a tensor cannot be cloned to another thread, and its data cannot be taken away by one', (t) => {
  const call = validCall('cpu')
  const clone = structuredClone(call.src2dst)
  t.is(t.throws(() => postReorder({ ...call, src2dst: clone }), { instanceOf: EpmoeError })?.code, 'ERR_NOT_A_TENSOR')
  const tensor = Tensor.zeros([4])
  const data = tensor.data as Float32Array
  data[1] = 7
  // Node 20 copies such a buffer instead of transferring it; later versions refuse.
  try {
    structuredClone(data, { transfer: [data.buffer as ArrayBuffer] })
  } catch (error) {
    t.is((error as Error).name, 'DataCloneError')
  }
  t.deepEqual([...(tensor.data as Float32Array)], [0, 7, 0, 0])
})
