import test from 'ava'
import { type Device, EpmoeError, postReorder, Tensor } from 'epmoe'
import { on, read, runPostReorder, validCall, validResult } from './helpers/call.js'
import { gpu, testDevices } from './helpers/devices.js'
import { evaluate } from './helpers/python.js'

type Call = Record<string, unknown>

interface Mistake {
  title: string
  /** Changes a valid call into the mistaken one. */
  make: (call: Call, device: Device) => Call
  code: string
  argument: string
  /** What the error has to say. */
  expected: RegExp
  received: RegExp
}

const disposed = (device: Device) => {
  const tensor = on(device, new Int32Array(6), [6])
  tensor.dispose()
  return tensor
}

const mistakes: Mistake[] = [
  {
    title: 'wrong dtype of indices',
    make: (call, device) => ({ ...call, src2dst: on(device, new Float32Array(6), [6]) }),
    code: 'ERR_DTYPE',
    argument: 'src2dst',
    expected: /int32 or int64/,
    received: /float32/,
  },
  {
    title: 'output dtype other than that of downOutput',
    make: (call, device) => ({ ...call, output: on(device, new Uint16Array(24), [3, 8], 'bfloat16') }),
    code: 'ERR_DTYPE',
    argument: 'output',
    expected: /float32 \(as downOutput\)/,
    received: /bfloat16/,
  },
  {
    title: 'integers as activations',
    make: (call, device) => ({ ...call, downOutput: on(device, new Int32Array(48), [6, 8]) }),
    code: 'ERR_DTYPE',
    argument: 'downOutput',
    expected: /float32, float16 or bfloat16/,
    received: /int32/,
  },
  {
    title: 'wrong rank',
    make: (call, device) => ({ ...call, topkWeights: on(device, new Float32Array(6), [6]) }),
    code: 'ERR_RANK',
    argument: 'topkWeights',
    expected: /\[T, K\]/,
    received: /\[6\]/,
  },
  {
    title: 'hidden sizes that differ',
    make: (call, device) => ({ ...call, output: on(device, new Float32Array(27), [3, 9]) }),
    code: 'ERR_SHAPE',
    argument: 'output',
    expected: /H = 8 \(from downOutput\)/,
    received: /\[3, 9\]/,
  },
  {
    title: 'token counts that differ',
    make: (call, device) => ({ ...call, topkIds: on(device, new Int32Array(8), [4, 2]) }),
    code: 'ERR_SHAPE',
    argument: 'topkIds',
    expected: /T = 3 \(from output\)/,
    received: /\[4, 2\]/,
  },
  {
    title: 'src2dst of another length than T*K',
    make: (call, device) => ({ ...call, src2dst: on(device, new Int32Array(7), [7]) }),
    code: 'ERR_SHAPE',
    argument: 'src2dst',
    expected: /T\*K/,
    received: /\[7\]/,
  },
  {
    title: 'K = 0',
    make: (call, device) => ({
      ...call,
      src2dst: on(device, new Int32Array(0), [0]),
      topkIds: on(device, new Int32Array(0), [3, 0]),
      topkWeights: on(device, new Float32Array(0), [3, 0]),
    }),
    code: 'ERR_SHAPE',
    argument: 'topkWeights',
    expected: /K of 1 or more/,
    received: /K = 0/,
  },
  {
    title: 'output that is also an input',
    make: (call, device) => {
      const memory = Tensor.zeros([72], { device })
      return { ...call, downOutput: memory.view([6, 8]), output: memory.view([3, 8]) }
    },
    code: 'ERR_OVERLAP',
    argument: 'output',
    expected: /no byte with downOutput/,
    received: /same address/,
  },
  {
    title: 'output that overlaps an input partly',
    make: (call, device) => {
      const memory = Tensor.zeros([72], { device })
      return { ...call, downOutput: memory.view([6, 8]), output: memory.view([3, 8], 44) }
    },
    code: 'ERR_OVERLAP',
    argument: 'output',
    expected: /no byte/,
    received: /overlapping/,
  },
  {
    title: 'a disposed tensor',
    make: (call, device) => ({ ...call, src2dst: disposed(device) }),
    code: 'ERR_DISPOSED',
    argument: 'src2dst',
    expected: /live tensor/,
    received: /disposed/,
  },
  {
    title: 'a missing tensor',
    make: ({ topkWeights: _, ...call }) => call,
    code: 'ERR_MISSING_ARGUMENT',
    argument: 'topkWeights',
    expected: /a tensor/,
    received: /nothing/,
  },
  {
    title: 'a typed array for a tensor',
    make: (call) => ({ ...call, src2dst: new Int32Array(6) }),
    code: 'ERR_NOT_A_TENSOR',
    argument: 'src2dst',
    expected: /Tensor/,
    received: /Int32Array/,
  },
  {
    title: 'an object with an id that is no Python object',
    make: (call) => ({ ...call, output: { id: 0xdeadbeef, callable: false } }),
    code: 'ERR_NOT_A_TENSOR',
    argument: 'output',
    expected: /Tensor/,
    received: /plain object/,
  },
  {
    title: 'a Python object that is no tensor',
    make: (call) => ({ ...call, output: evaluate('[1, 2]') }),
    code: 'ERR_NOT_A_TENSOR',
    argument: 'output',
    expected: /tensor/,
    received: /another type/,
  },
  {
    title: 'a range that is reversed',
    make: (call) => ({ ...call, startExpertId: 5, endExpertId: 4 }),
    code: 'ERR_VALUE',
    argument: 'endExpertId',
    expected: /startExpertId \(5\) or more/,
    received: /^4$/,
  },
  {
    title: 'a NaN factor',
    make: (call) => ({ ...call, routedScalingFactor: Number.NaN }),
    code: 'ERR_VALUE',
    argument: 'routedScalingFactor',
    expected: /finite/,
    received: /nan/i,
  },
  {
    title: 'an infinite factor',
    make: (call) => ({ ...call, routedScalingFactor: Number.POSITIVE_INFINITY }),
    code: 'ERR_VALUE',
    argument: 'routedScalingFactor',
    expected: /finite/,
    received: /inf/i,
  },
  {
    title: 'a factor that is a string',
    make: (call) => ({ ...call, routedScalingFactor: '2' }),
    code: 'ERR_VALUE',
    argument: 'routedScalingFactor',
    expected: /number/,
    received: /"2"/,
  },
  {
    title: 'a fractional expert',
    make: (call) => ({ ...call, endExpertId: 1.5 }),
    code: 'ERR_VALUE',
    argument: 'endExpertId',
    expected: /whole number/,
    received: /1\.5/,
  },
  {
    title: 'unknown numerics',
    make: (call) => ({ ...call, numerics: 'fp64' }),
    code: 'ERR_VALUE',
    argument: 'numerics',
    expected: /'fp32' or 'triton'/,
    received: /fp64/,
  },
  {
    title: 'a misspelt argument',
    make: (call) => ({ ...call, topk_ids: 3 }),
    code: 'ERR_UNEXPECTED_ARGUMENT',
    argument: 'topk_ids',
    expected: /topkIds/,
    received: /3/,
  },
  {
    title: 'a stream that is none',
    make: (call) => ({ ...call, stream: 7 }),
    code: 'ERR_VALUE',
    argument: 'stream',
    expected: /a Stream/,
    received: /7/,
  },
  {
    title: 'src2dst beyond the rows',
    make: (call, device) => ({ ...call, src2dst: on(device, new Int32Array([5, 0, 6, 1, 3, 2]), [6]) }),
    code: 'ERR_INDEX_OUT_OF_RANGE',
    argument: 'src2dst',
    expected: /\[0, 6\)/,
    received: /6 at token 1, slot 0/,
  },
  {
    title: 'src2dst below the rows',
    make: (call, device) => ({ ...call, src2dst: on(device, new Int32Array([5, 0, 4, 1, 3, -2147483648]), [6]) }),
    code: 'ERR_INDEX_OUT_OF_RANGE',
    argument: 'src2dst',
    expected: /\[0, 6\)/,
    received: /-2147483648 at token 2, slot 1/,
  },
  {
    title: 'src2dst beyond the rows by way of 64 bits and dstStart',
    make: (call, device) => ({
      ...call,
      src2dst: on(device, new BigInt64Array([5n, 0n, 2n ** 63n - 1n, 1n, 3n, 2n]), [6]),
      dstStart: -5,
    }),
    code: 'ERR_INDEX_OUT_OF_RANGE',
    argument: 'src2dst',
    expected: /\[-5, 1\)/,
    received: /at token/,
  },
]

for (const device of testDevices) {
  test(`the call that mistakes are made from is right, on ${device}`, (t) => {
    const call = validCall(device)
    runPostReorder(call, device)
    t.deepEqual(read(call.output), validResult())
  })

  for (const { title, make, code, argument, expected, received } of mistakes) {
    test(`${title}, on ${device}`, (t) => {
      const valid = validCall(device)
      const call = make(valid, device) as unknown as typeof valid
      const error = t.throws(() => runPostReorder(call, device), { instanceOf: EpmoeError })
      t.is(error?.code, code, error?.message)
      t.is(error?.argument, argument)
      t.regex(error?.expected ?? '', expected)
      t.regex(error?.received ?? '', received)
      t.is(error?.op, 'postReorder')
      t.not(error?.message, '')
      // Nothing was written unless the error says so, and nothing is broken for the next call.
      if (code !== 'ERR_INDEX_OUT_OF_RANGE') t.true(read(valid.output).every(Number.isNaN))
      const again = validCall(device)
      runPostReorder(again, device)
      t.deepEqual(read(again.output), validResult())
    })
  }

  test(`a slot out of range is skipped and all others are computed, on ${device}`, (t) => {
    const call = { ...validCall(device), src2dst: on(device, new Int32Array([5, 0, 99, 1, 3, 2]), [6]) }
    t.throws(() => runPostReorder(call, device), { instanceOf: EpmoeError })
    const right = validResult()
    for (let column = 0; column < 8; column++) right[8 + column] = 0.25 * (1 + column / 8)
    t.deepEqual(read(call.output), right)
  })

  test(`torch tensors that are not contiguous are refused, on ${device}`, (t) => {
    const call = {
      ...validCall(device),
      downOutput: evaluate(`torch.ones(8, 6, device=${JSON.stringify(device)}).t()`),
    }
    const error = t.throws(() => postReorder(call), { instanceOf: EpmoeError })
    t.is(error?.code, 'ERR_NOT_CONTIGUOUS')
    t.is(error?.argument, 'downOutput')
    t.regex(error?.received ?? '', /strides \[1, 6\]/)
  })
}

const refused: [string, string, RegExp][] = [
  ['requires grad', 'torch.ones(6, 8, requires_grad=True)', /requires grad/],
  ['is sparse', 'torch.ones(6, 8).to_sparse()', /sparse/],
  ['is on meta', 'torch.ones(6, 8, device="meta")', /meta/],
  ['is quantised', 'torch.quantize_per_tensor(torch.ones(6, 8), 0.1, 0, torch.qint8)', /quantised/],
  ['has its negative bit set', 'torch._neg_view(torch.ones(6, 8))', /negative bit/],
]
for (const [what, expression, received] of refused) {
  test(`a torch tensor that ${what} is refused by name`, (t) => {
    const error = t.throws(() => postReorder({ ...validCall(), downOutput: evaluate(expression) }), {
      instanceOf: EpmoeError,
    })
    t.is(error?.code, 'ERR_UNSUPPORTED_TENSOR')
    t.is(error?.argument, 'downOutput')
    t.regex(error?.received ?? '', received)
  })
}

test('a conjugate tensor is refused by its dtype', (t) => {
  const downOutput = evaluate('torch.ones(6, 8, dtype=torch.complex64).conj()')
  const error = t.throws(() => postReorder({ ...validCall(), downOutput }), { instanceOf: EpmoeError })
  t.is(error?.code, 'ERR_DTYPE')
  t.is(error?.received, 'complex64')
})

test('a disposed PyRef is noticed', (t) => {
  const downOutput = evaluate('torch.ones(6, 8)')
  downOutput.dispose()
  t.is(t.throws(() => postReorder({ ...validCall(), downOutput }), { instanceOf: EpmoeError })?.code, 'ERR_DISPOSED')
})

test('no arguments at all', (t) => {
  const call = postReorder as unknown as (args?: unknown) => void
  t.is(t.throws(() => call(), { instanceOf: EpmoeError })?.code, 'ERR_MISSING_ARGUMENT')
  t.is(t.throws(() => call(null), { instanceOf: EpmoeError })?.code, 'ERR_MISSING_ARGUMENT')
})

if (gpu !== undefined) {
  test('tensors on different devices', (t) => {
    const call = { ...validCall('cpu'), downOutput: validCall(gpu).downOutput }
    const error = t.throws(() => postReorder(call), { instanceOf: EpmoeError })
    t.is(error?.code, 'ERR_DEVICE')
    t.regex(error?.expected ?? '', /cuda:0 \(as downOutput\)/)
    t.is(error?.received, 'cpu')
  })
}
