import test from 'ava'
import { type Protocol, type PyRef, stats, Tensor } from 'epmoe'
import { read } from './helpers/call.js'
import { testDevices } from './helpers/devices.js'
import { evaluate, python, torch, valueOf } from './helpers/python.js'

const protocols: Protocol[] = ['exchange', 'dlpack']

for (const device of testDevices) {
  const quoted = JSON.stringify(device)
  for (const protocol of protocols) {
    test(`torch to Tensor on ${device} by ${protocol}: one memory, seen from both sides`, (t) => {
      using source = evaluate(`torch.arange(6., device=${quoted}).view(2, 3)`)
      using tensor = Tensor.fromTorch(source, { protocol })
      t.is(tensor.dataPtr, BigInt(valueOf('x.data_ptr()', { x: source }) as number))
      t.is(tensor.device, device)
      t.deepEqual([...tensor.shape], [2, 3])
      t.true(tensor.isTorch)
      // Written by torch, read here.
      source.method('mul_', 10).dispose()
      t.deepEqual(read(tensor), [0, 10, 20, 30, 40, 50])
      // Written here, read by torch.
      using news = Tensor.from(new Float32Array([1, 2, 3, 4, 5, 6]), [2, 3])
      tensor.copyFrom(news)
      t.deepEqual(valueOf('(torch.cuda.synchronize() if x.is_cuda else None, x.tolist())[1]', { x: source }), [
        [1, 2, 3],
        [4, 5, 6],
      ])
    })

    test(`Tensor to torch on ${device} by ${protocol}: one memory, seen from both sides`, (t) => {
      using host = Tensor.from(new Float32Array([0, 1, 2, 3]), [2, 2])
      using tensor = device === 'cpu' ? host.view([2, 2]) : host.to(device)
      using view = tensor.toTorch({ protocol }) as PyRef
      t.is(BigInt(valueOf('x.data_ptr()', { x: view }) as number), tensor.dataPtr)
      t.is(valueOf('str(x.device)', { x: view }), device)
      // Written by torch, read here.
      view.method('add_', 10).dispose()
      t.deepEqual(read(tensor), [10, 11, 12, 13])
      // Written here, read by torch.
      using news = Tensor.from(new Float32Array([7, 8, 9, 10]), [2, 2])
      tensor.copyFrom(news)
      t.deepEqual(valueOf('x.tolist()', { x: view }), [
        [7, 8],
        [9, 10],
      ])
    })

    test(`memory lives as long as its last holder on ${device}, by ${protocol}`, (t) => {
      // torch's tensor goes first: the Tensor keeps the memory.
      const source = evaluate(`torch.full((1000,), 3., device=${quoted})`)
      const tensor = Tensor.fromTorch(source, { protocol })
      source.dispose()
      evaluate(`[torch.zeros(1000, device=${quoted}) for _ in range(10)]`).dispose()
      t.true(read(tensor).every((value) => value === 3))
      tensor.dispose()
      // The Tensor goes first: torch keeps it.
      const own = Tensor.zeros([1000], { device })
      const view = own.toTorch({ protocol }) as PyRef
      own.dispose()
      Tensor.zeros([1000], { device }).dispose()
      t.is(valueOf('float(x.sum())', { x: view }), 0)
      view.dispose()
    })
  }

  for (const dtype of ['float32', 'float16', 'bfloat16', 'float8_e4m3fn', 'int32', 'int64', 'uint8', 'float64']) {
    test(`${dtype} keeps its name both ways on ${device}`, (t) => {
      for (const protocol of protocols) {
        using source = evaluate(`torch.zeros(3, device=${quoted}).to(torch.${dtype})`)
        using tensor = Tensor.fromTorch(source, { protocol })
        t.is(tensor.dtype, dtype as 'int32')
        // The older capsules have no code for float8; the exchange table has.
        if (protocol === 'dlpack' && dtype.startsWith('float8')) continue
        using view = tensor.toTorch({ protocol }) as PyRef
        t.is(valueOf('str(x.dtype)', { x: view }), `torch.${dtype}`)
      }
    })
  }
}

test('a round trip ends at the same memory', (t) => {
  using source = evaluate('torch.ones(4)')
  using tensor = Tensor.fromTorch(source)
  using back = tensor.toTorch() as PyRef
  t.is(valueOf('x.data_ptr()', { x: back }), valueOf('x.data_ptr()', { x: source }))
})

test('a TypedArray reaches torch without a copy', (t) => {
  const array = new Float32Array([1, 2, 3])
  using tensor = Tensor.from(array)
  using view = tensor.toTorch() as PyRef
  array[1] = 20
  t.deepEqual(valueOf('x.tolist()', { x: view }), [1, 20, 3])
})

test('strides of a torch view arrive as they are', (t) => {
  using tensor = Tensor.fromTorch(evaluate('torch.arange(12.).view(3, 4).t()'))
  t.deepEqual([...tensor.strides], [1, 4])
  t.false(tensor.contiguous)
  t.throws(() => tensor.data, { code: 'ERR_NOT_CONTIGUOUS' })
})

test('tensors without elements cross too', (t) => {
  for (const protocol of protocols) {
    using tensor = Tensor.fromTorch(evaluate('torch.empty(0, 5)'), { protocol })
    t.deepEqual([...tensor.shape], [0, 5])
    t.is(tensor.data.length, 0)
    using view = tensor.toTorch({ protocol }) as PyRef
    t.deepEqual(valueOf('list(x.shape)', { x: view }), [0, 5])
  }
})

test('borrowing a tensor 10,000 times leaves none behind', (t) => {
  using source = evaluate('torch.ones(16)')
  const before = stats().cpu.tensors
  const references = valueOf('__import__("sys").getrefcount(x)', { x: source }) as number
  for (let i = 0; i < 5000; i++) {
    Tensor.fromTorch(source).dispose()
    Tensor.fromTorch(source, { protocol: 'dlpack' }).dispose()
  }
  t.is(stats().cpu.tensors, before)
  t.is(valueOf('__import__("sys").getrefcount(x)', { x: source }), references)
})

test('the exchange table of this torch is used', (t) => {
  t.true(valueOf('hasattr(torch.Tensor, "__dlpack_c_exchange_api__")'))
  t.truthy(torch)
  t.truthy(python)
})
