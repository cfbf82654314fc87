import test from 'ava'
import { type Device, kw, type MoeLayerOptions, moeLayer, type PyRef, Stream } from 'epmoe'
import { gpu, testDevices } from './helpers/devices.js'
import { allowedError, reference } from './helpers/golden.js'
import { evaluate, python, torch, valueOf } from './helpers/python.js'

// Memory that torch hands out holds NaN, so that a row nobody has written cannot go unnoticed.
torch.method('use_deterministic_algorithms', true, kw({ warn_only: true })).dispose()

test('the memory that torch hands out is poisoned', (t) => {
  for (const device of testDevices) t.true(valueOf('torch.empty(64, device=d).isnan().all().item()', { d: device }))
})

interface Case {
  dtype: 'float32' | 'float16' | 'bfloat16'
  device: Device
  tokens: number
  topk: number
  hidden: number
  half: number
  experts: number
  activation: 'silu' | 'gelu' | 'swigluoai' | 'square'
  biases: boolean
  ids: 'int32' | 'int64'
  added: boolean
  numerics: 'fp32' | 'triton'
}

const usual: Case = {
  dtype: 'bfloat16',
  device: 'cpu',
  tokens: 48,
  topk: 4,
  hidden: 96,
  half: 64,
  experts: 8,
  activation: 'silu',
  biases: false,
  ids: 'int64',
  added: false,
  numerics: 'fp32',
}

const factor = 1.5

/** The tensors of a case, by the names in helpers/moe_layer.py. */
function tensors(case_: Case): (name: string) => PyRef {
  const { tokens, topk, hidden, half, experts, dtype, device, activation, ids } = case_
  const width = activation === 'square' ? half : 2 * half
  const made = reference.method('make', tokens, topk, hidden, half, experts, dtype, device, 1, width, ids)
  return (name) => (name === '' ? made : made.item(name))
}

/** The layer on so many ranks, their outputs summed in float64. */
function run(case_: Case, x: (name: string) => PyRef, ranks = 1): PyRef {
  const local = case_.experts / ranks
  const outputs = Array.from({ length: ranks }, (_, rank) => {
    using layer = moeLayer(optionsOf(case_, x, rank * local, local))
    const added = case_.added && rank === 0 ? { sharedOutput: x('shared'), residual: x('residual') } : {}
    return layer.forward({ hiddenStates: x('hidden'), topkIds: x('ids'), topkWeights: x('weights'), ...added })
  })
  return evaluate('sum(x.double() for x in outputs)', { outputs })
}

function optionsOf(case_: Case, x: (name: string) => PyRef, start = 0, local = case_.experts): MoeLayerOptions {
  const part = (name: string) => evaluate('x[a:b]', { x: x(name), a: start, b: start + local })
  return {
    w13: part('w13'),
    w2: part('w2'),
    ...(case_.biases && { w13Bias: part('w13_bias'), w2Bias: part('w2_bias') }),
    startExpertId: start,
    numExperts: case_.experts,
    activation: case_.activation === 'square' ? (rows) => rows.method('square') : case_.activation,
    routedScalingFactor: factor,
    numerics: case_.numerics,
  }
}

/** Our error and that of plain torch in the same dtype, both against plain torch in float64. */
function errors(case_: Case, x: (name: string) => PyRef, output: PyRef): { ours: number; allowed: number } {
  const { activation, biases, added } = case_
  using exact = reference.method('plain', x(''), activation, biases, factor, added, 'float64')
  using same = reference.method('plain', x(''), activation, biases, factor, added)
  const error = (result: PyRef) => reference.method('error', result, exact).toJS() as number
  const attainable = [...reference.method('attainable', x(''), activation, biases, factor, added)].map(error)
  return { ours: error(output), allowed: allowedError(error(same), attainable, case_.tokens * case_.hidden) }
}

const cases: Partial<Case>[] = [
  {},
  { dtype: 'float32' },
  { dtype: 'float16' },
  { ids: 'int32' },
  { added: true },
  { biases: true },
  { activation: 'gelu' },
  { activation: 'gelu', dtype: 'float32', biases: true },
  { activation: 'swigluoai', biases: true },
  { activation: 'square' },
  { topk: 1, added: true },
  { topk: 8 },
  { tokens: 1, hidden: 4096 },
  { numerics: 'triton' },
  // Rows of 136 bytes after the first GEMM: grouped_mm does it, but pads them on CUDA.
  { hidden: 64, half: 34, biases: true },
  // Rows of 100 bytes: too odd for grouped_mm, so a matmul an expert.
  { hidden: 50, half: 33, tokens: 100, biases: true },
  { hidden: 1, half: 1, dtype: 'float32' },
  { hidden: 16, half: 1, biases: true },
]

for (const device of testDevices) {
  const base = { ...usual, device }
  for (const variant of cases) {
    const case_ = { ...base, ...variant }
    const told = Object.entries(variant).map(([key, value]) => `${key} ${value}`)
    test(`no worse than plain torch: ${told.join(', ') || 'bfloat16, silu'}, on ${device}, on 1, 2 and 8 ranks`, (t) => {
      const x = tensors(case_)
      for (const ranks of [1, 2, 8]) {
        const { ours, allowed } = errors(case_, x, run(case_, x, ranks))
        t.true(ours <= allowed, `${ranks} ranks: ${ours}, allowed ${allowed}`)
      }
    })
  }

  test(`numerics reach the ops on ${device}`, (t) => {
    const x = tensors(base)
    const [fp32, triton] = (['fp32', 'triton'] as const).map((numerics) => run({ ...base, numerics }, x))
    t.false(valueOf('torch.equal(a, b)', { a: fp32, b: triton }))
  })

  test(`no tokens are no work on ${device}`, (t) => {
    const case_ = { ...base, tokens: 0, biases: true, added: true }
    for (const ranks of [1, 2]) t.deepEqual(valueOf('list(x.shape)', { x: run(case_, tensors(case_), ranks) }), [0, 96])
  })

  test(`experts without tokens, and tokens without experts, on ${device}`, (t) => {
    const case_: Case = { ...base, biases: true }
    const x = tensors(case_)
    // Experts 2 and 5 alone are chosen; every third token has none, and some slots of the others are empty.
    using ids = evaluate(
      '(y := torch.full_like(x, -1), y[0::3, 0].fill_(5), y[1::3, 2].fill_(2), y[1::3, 3].fill_(5))[0]',
      { x: x('ids') },
    )
    const made = x('')
    made.setItem('ids', ids)
    const { ours, allowed } = errors(case_, x, run(case_, x))
    t.true(ours <= allowed, `${ours}, allowed ${allowed}`)
    t.is(valueOf('x[2::3].abs().max().item()', { x: run(case_, x) }), 0)
    // Rank 1 of 2 has expert 5, rank 0 has expert 2; of rank 3 of 4 nobody wants anything.
    const idle = moeLayer(optionsOf(case_, x, 6, 2))
    const call = { hiddenStates: x('hidden'), topkIds: x('ids'), topkWeights: x('weights') }
    t.is(valueOf('x.abs().max().item()', { x: idle.forward(call) }), 0)
    const added = { sharedOutput: x('shared'), residual: x('residual') }
    const sum = evaluate('(s.float() + r.float()).to(s.dtype)', { s: x('shared'), r: x('residual') })
    t.true(valueOf('torch.equal(a, b)', { a: idle.forward({ ...call, ...added }), b: sum }))
  })

  test(`a given output is written and returned; weights may be transposed views or parameters, on ${device}`, (t) => {
    const x = tensors(base)
    const call = { hiddenStates: x('hidden'), topkIds: x('ids'), topkWeights: x('weights') }
    const options = optionsOf(base, x)
    const expected = moeLayer(options).forward(call)
    const output = evaluate('torch.full_like(x, float("nan"))', { x: x('hidden') })
    t.is(moeLayer(options).forward({ ...call, output }), output)
    t.true(valueOf('torch.equal(a, b)', { a: output, b: expected }))
    const parameter = (ref: PyRef) =>
      evaluate('torch.nn.Parameter(x.transpose(1, 2).contiguous()).transpose(1, 2)', { x: ref })
    const views = { ...options, w13: parameter(options.w13), w2: parameter(options.w2) }
    const { ours, allowed } = errors(base, x, moeLayer(views).forward(call))
    t.true(ours <= allowed, `${ours}, allowed ${allowed}`)
  })

  test(`forwardAsync gives the same, several at a time, and rejects with what went wrong on ${device}`, async (t) => {
    const x = tensors(base)
    const call = { hiddenStates: x('hidden'), topkIds: x('ids'), topkWeights: x('weights') }
    const layer = moeLayer(optionsOf(base, x))
    const expected = layer.forward(call)
    const before = python.pending
    const calls = Array.from({ length: 5 }, () => layer.forwardAsync(call))
    t.true(python.pending > before, 'nothing is done on the other thread')
    for (const output of await Promise.all(calls)) {
      t.true(valueOf('torch.equal(a, b)', { a: output, b: expected }))
    }
    const wrong = layer.forwardAsync({ ...call, topkWeights: x('ids') })
    await t.throwsAsync(wrong, { code: 'ERR_DTYPE' })
    const failing = moeLayer({
      ...optionsOf(base, x),
      activation: () => evaluate('1 / 0'),
    })
    await t.throwsAsync(failing.forwardAsync(call), { code: 'ERR_PYTHON_EXCEPTION', message: /ZeroDivisionError/ })
  })

  test(`an id that the model does not have is reported on ${device}, on every rank`, (t) => {
    const x = tensors(base)
    for (const [start, local] of [
      [0, 8],
      [4, 4],
    ] as const) {
      const layer = moeLayer(optionsOf(base, x, start, local))
      for (const wrong of [8, 2147483647, -2, -2147483648]) {
        const topkIds = evaluate('(y := x.clone(), y[3, 1].fill_(w))[0]', { x: x('ids'), w: wrong })
        const call = () => {
          layer.forward({ hiddenStates: x('hidden'), topkIds, topkWeights: x('weights') }).dispose()
          if (device !== 'cpu') Stream.torchCurrent(device).synchronizeSync()
        }
        t.throws(call, { code: 'ERR_INDEX_OUT_OF_RANGE' }, `${wrong} from ${start}`)
      }
    }
  })
}

test('what is wrong with the weights is named', (t) => {
  const x = tensors(usual)
  const options = optionsOf(usual, x)
  const wrong = (change: object, argument: string, code: string) =>
    t.like(
      t.throws(() => moeLayer({ ...options, ...change })),
      { op: 'moeLayer', argument, code },
    )
  wrong({ w13: undefined }, 'w13', 'ERR_NOT_A_TENSOR')
  wrong({ w13: evaluate('x[0]', { x: x('w13') }) }, 'w13', 'ERR_SHAPE')
  wrong({ w13: evaluate('x.double()', { x: x('w13') }) }, 'w13', 'ERR_DTYPE')
  wrong({ w13: evaluate('x[:, :100]', { x: x('w13') }) }, 'w13', 'ERR_SHAPE')
  wrong({ w2: evaluate('x[:7]', { x: x('w2') }) }, 'w2', 'ERR_SHAPE')
  wrong({ w2: evaluate('x.float()', { x: x('w2') }) }, 'w2', 'ERR_DTYPE')
  wrong({ w2Bias: x('w13_bias') }, 'w2Bias', 'ERR_SHAPE')
  wrong({ numExperts: 7 }, 'numExperts', 'ERR_VALUE')
  wrong({ startExpertId: -1 }, 'startExpertId', 'ERR_VALUE')
  wrong({ startExpertId: 1 }, 'numExperts', 'ERR_VALUE')
  wrong({ bias: x('w2_bias') }, 'bias', 'ERR_UNEXPECTED_ARGUMENT')
  wrong({ activation: 'relu' }, 'activation', 'ERR_VALUE')
  wrong({ numerics: 'exact' }, 'numerics', 'ERR_VALUE')
  for (const factor of [Number.NaN, Infinity, 1e39, '2']) {
    wrong({ routedScalingFactor: factor }, 'routedScalingFactor', 'ERR_VALUE')
  }
  wrong({ w13: evaluate('x[:0]', { x: x('w13') }), w2: evaluate('x[:0]', { x: x('w2') }) }, 'w13', 'ERR_SHAPE')
  for (const count of [-1, 0.5, Number.NaN, '8']) wrong({ cudaGraphTokens: count }, 'cudaGraphTokens', 'ERR_VALUE')
  t.throws(() => moeLayer(undefined as never), { code: 'ERR_MISSING_ARGUMENT' })
})

test('what is wrong with a call is named', (t) => {
  const x = tensors(usual)
  const layer = moeLayer(optionsOf(usual, x))
  const call = { hiddenStates: x('hidden'), topkIds: x('ids'), topkWeights: x('weights') }
  const wrong = (change: object, argument: string, code: string) =>
    t.like(
      t.throws(() => layer.forward({ ...call, ...change })),
      { op: 'moeLayer', argument, code },
    )
  wrong({ hiddenStates: evaluate('x[:, :95]', { x: x('hidden') }) }, 'hiddenStates', 'ERR_SHAPE')
  wrong({ hiddenStates: evaluate('x.float()', { x: x('hidden') }) }, 'hiddenStates', 'ERR_DTYPE')
  wrong({ hiddenStates: evaluate('x.t().contiguous().t()', { x: x('hidden') }) }, 'hiddenStates', 'ERR_NOT_CONTIGUOUS')
  wrong(
    { hiddenStates: evaluate('x.clone().requires_grad_()', { x: x('hidden') }) },
    'hiddenStates',
    'ERR_UNSUPPORTED_TENSOR',
  )
  wrong({ topkIds: evaluate('x[1:]', { x: x('ids') }) }, 'topkIds', 'ERR_SHAPE')
  wrong({ topkIds: evaluate('x.float()', { x: x('ids') }) }, 'topkIds', 'ERR_DTYPE')
  wrong({ topkWeights: evaluate('x[:, 1:]', { x: x('weights') }) }, 'topkWeights', 'ERR_SHAPE')
  wrong({ topkIds: evaluate('x[:, :0].contiguous()', { x: x('ids') }) }, 'topkIds', 'ERR_SHAPE')
  wrong({ residual: evaluate('x[1:]', { x: x('residual') }) }, 'residual', 'ERR_SHAPE')
  wrong({ output: 3 }, 'output', 'ERR_NOT_A_TENSOR')
  wrong({ shared: x('shared') }, 'shared', 'ERR_UNEXPECTED_ARGUMENT')
  if (gpu !== undefined) wrong({ topkIds: evaluate('x.cuda()', { x: x('ids') }) }, 'topkIds', 'ERR_DEVICE')
})

test('a layer stays what it was made of, whatever becomes of the options', (t) => {
  const x = tensors(usual)
  const options = optionsOf(usual, x)
  const layer = moeLayer(options)
  const call = { hiddenStates: x('hidden'), topkIds: x('ids'), topkWeights: x('weights') }
  const before = layer.forward(call)
  Object.assign(options, { w13: x('w2'), activation: 'swigluoai', routedScalingFactor: 7 })
  t.true(valueOf('torch.equal(a, b)', { a: layer.forward(call), b: before }))
  layer.dispose()
})

test('where products wait, graphs may be asked for and are not made', (t) => {
  for (const case_ of [usual, ...(gpu === undefined ? [] : [{ ...usual, dtype: 'float32' as const, device: gpu }])]) {
    const x = tensors(case_)
    const call = { hiddenStates: x('hidden'), topkIds: x('ids'), topkWeights: x('weights') }
    let activations = 0
    const activation = (rows: PyRef) => {
      activations++
      return evaluate('torch.nn.functional.silu(x[:, :64]) * x[:, 64:]', { x: rows })
    }
    const layer = moeLayer({ ...optionsOf(case_, x), activation, cudaGraphTokens: 64 })
    t.true(layer.waits)
    for (let i = 0; i < 3; i++) layer.forward(call).dispose()
    t.is(activations, 3)
  }
})

if (gpu !== undefined) {
  const device = gpu
  for (const [start, local, variant] of [
    [0, 8, {}],
    [4, 4, { biases: true }],
    [0, 8, { added: true, ids: 'int32' }],
    [2, 3, { activation: 'swigluoai', biases: true, numerics: 'triton', added: true }],
  ] as [number, number, Partial<Case>][]) {
    const told = Object.entries(variant).map(([key, value]) => `${key} ${value}`)
    test(`few tokens are replayed as a graph: experts from ${start} on, ${told.join(', ') || 'silu'}`, (t) => {
      const case_: Case = { ...usual, device, ...variant }
      const x = tensors(case_)
      const options = optionsOf(case_, x, start, local)
      const layer = moeLayer({ ...options, cudaGraphTokens: 24 })
      const plain = moeLayer(options)
      t.false(layer.waits)
      // Fewer than before, sizes that share a graph, the most that there is one for, and more; inputs that change.
      for (const [round, count] of [1, 5, 8, 3, 24, 17, 2, 0, 25, 7, 24].entries()) {
        const rows = (name: string) =>
          evaluate(
            'x[r : r + n] if name != "ids" else torch.where(torch.rand(n, 4, device=x.device) < 0.8, x[:n], -1)',
            {
              x: x(name),
              name,
              r: round,
              n: count,
            },
          )
        const [hiddenStates, topkIds, topkWeights] = ['hidden', 'ids', 'weights'].map(rows) as [PyRef, PyRef, PyRef]
        const added = case_.added ? { sharedOutput: rows('shared'), residual: rows('residual') } : {}
        const call = {
          hiddenStates,
          topkIds: evaluate('x.to(y.dtype)', { x: topkIds, y: x('ids') }),
          topkWeights,
          ...added,
        }
        const expected = plain.forward(call)
        const result = layer.forward(call)
        t.true(valueOf('torch.equal(a, b)', { a: result, b: expected }), `${count} tokens`)
        const output = evaluate('torch.full_like(x, float("nan"))', { x: hiddenStates })
        t.is(layer.forward({ ...call, output }), output)
        t.true(valueOf('torch.equal(a, b)', { a: output, b: expected }), `${count} tokens into an output`)
        t.true(valueOf('torch.equal(a, b)', { a: result, b: expected }), 'what was returned stays as it was')
      }
    })
  }

  test('an activation is called while capturing only; one that waits is told of, and harms nothing', (t) => {
    const case_: Case = { ...usual, device }
    const x = tensors(case_)
    const rows = (count: number) => {
      const part = (name: string) => evaluate('x[:n]', { x: x(name), n: count })
      return { hiddenStates: part('hidden'), topkIds: part('ids'), topkWeights: part('weights') }
    }
    const silu = 'torch.nn.functional.silu(x[:, :64]) * x[:, 64:]'
    const expected = moeLayer({ ...optionsOf(case_, x), activation: (y) => evaluate(silu, { x: y }) }).forward(rows(4))
    let [calls, waits] = [0, true]
    const activation = (y: PyRef) => {
      calls++
      return evaluate(waits ? `(x.isnan().any().item(), ${silu})[1]` : silu, { x: y })
    }
    const layer = moeLayer({ ...optionsOf(case_, x), activation, cudaGraphTokens: 8 })
    for (let i = 0; i < 2; i++) {
      t.like(
        t.throws(() => layer.forward(rows(4))),
        { code: 'ERR_CAPTURE', argument: 'cudaGraphTokens' },
      )
    }
    waits = false
    calls = 0
    for (let i = 0; i < 3; i++) t.true(valueOf('torch.equal(a, b)', { a: layer.forward(rows(4)), b: expected }))
    t.is(calls, 2, 'once to load kernels and once captured')
    layer.forward(rows(3)).dispose()
    t.is(calls, 2)
    layer.forward(rows(9)).dispose()
    t.is(calls, 3)
  })

  test('layers with graphs on several streams, inside another graph, and disposed in turn', (t) => {
    const case_: Case = { ...usual, device, tokens: 8 }
    const x = tensors(case_)
    const call = { hiddenStates: x('hidden'), topkIds: x('ids'), topkWeights: x('weights') }
    const expected = moeLayer(optionsOf(case_, x)).forward(call)
    const equal = (output: PyRef) => valueOf('torch.equal(a, b)', { a: output, b: expected })
    for (let generation = 0; generation < 3; generation++) {
      const layers = [0, 1, 2].map(() => moeLayer({ ...optionsOf(case_, x), cudaGraphTokens: 8 }))
      for (let round = 0; round < 20; round++) {
        using stream = evaluate('torch.cuda.Stream()')
        const outputs: PyRef[] = []
        evaluate('s.wait_stream(torch.cuda.current_stream())', { s: stream }).dispose()
        using context = torch.get('cuda').method('stream', stream)
        context.with(() => outputs.push(...layers.map((layer) => layer.forward(call))))
        evaluate('torch.cuda.current_stream().wait_stream(s)', { s: stream }).dispose()
        outputs.push(...layers.map((layer) => layer.forward(call)))
        for (const output of outputs) t.true(equal(output))
      }
      const graph = torch.get('cuda').method('CUDAGraph')
      using capture = torch.get('cuda').method('graph', graph)
      const outputs: PyRef[] = []
      capture.with(() => outputs.push(layers[0]!.forward(call)))
      for (const layer of layers) layer.dispose()
      graph.method('replay').dispose()
      t.true(equal(outputs[0]!))
    }
  })

  test('an id that the model does not have is reported by a replay as by a launch', (t) => {
    const case_: Case = { ...usual, device, tokens: 8 }
    const x = tensors(case_)
    const layer = moeLayer({ ...optionsOf(case_, x), cudaGraphTokens: 8 })
    const call = (topkIds: PyRef) => {
      const output = layer.forward({ hiddenStates: x('hidden'), topkIds, topkWeights: x('weights') })
      Stream.torchCurrent(device).synchronizeSync()
      return output
    }
    const expected = call(x('ids'))
    for (const wrong of [8, -2]) {
      const topkIds = evaluate('(y := x.clone(), y[3, 1].fill_(w))[0]', { x: x('ids'), w: wrong })
      t.throws(() => call(topkIds), { code: 'ERR_INDEX_OUT_OF_RANGE' })
      t.true(valueOf('torch.equal(a, b)', { a: call(x('ids')), b: expected }))
    }
  })

  for (const [start, local] of [
    [0, 8],
    [4, 4],
  ] as const) {
    test(`a whole layer with experts from ${start} on is captured in a CUDA graph and replayed with other inputs`, (t) => {
      const case_: Case = { ...usual, device, biases: true, added: true }
      const x = tensors(case_)
      const layer = moeLayer(optionsOf(case_, x, start, local))
      const call = {
        hiddenStates: x('hidden'),
        topkIds: x('ids'),
        topkWeights: x('weights'),
        sharedOutput: x('shared'),
        residual: x('residual'),
      }
      layer.forward(call).dispose() // loads kernels
      torch.get('cuda').method('synchronize').dispose()
      const graph = torch.get('cuda').method('CUDAGraph')
      const capture = torch.get('cuda').method('graph', graph)
      capture.method('__enter__').dispose()
      const output = layer.forward(call)
      capture.method('__exit__', null, null, null).dispose()
      for (const seed of [1, 2, 3]) {
        evaluate(
          '(torch.manual_seed(seed), h.normal_(), w.uniform_(), i.copy_(torch.rand(48, 8, device=i.device).argsort(1)[:, :4]))',
          { seed, h: x('hidden'), w: x('weights'), i: x('ids') },
        ).dispose()
        graph.method('replay').dispose()
        t.true(valueOf('torch.equal(a, b)', { a: output, b: layer.forward(call) }), String(seed))
        if (local === case_.experts) {
          const { ours, allowed } = errors(case_, x, output)
          t.true(ours <= allowed, `${ours}, allowed ${allowed}`)
        }
      }
    })
  }
}
