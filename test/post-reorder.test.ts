import { createRequire } from 'node:module'
import test from 'ava'
import { postReorder, setCpuThreads, Tensor } from 'epmoe'
import { on, read, runPostReorder, validCall, validResult } from './helpers/call.js'
import { testDevices } from './helpers/devices.js'
import { evaluate, valueOf } from './helpers/python.js'

for (const device of testDevices) {
  const quoted = JSON.stringify(device)
  const asTorch = (seed: number) => {
    const made = evaluate(
      `(torch.manual_seed(${seed}), dict(down_output=torch.randn(24, 40), output=torch.full((6, 40), float('nan')),` +
        ` src2dst=torch.randperm(24), topk_ids=torch.randint(0, 4, (6, 4)), topk_weights=torch.rand(6, 4)))[1]`,
    )
    const move = (name: string) => evaluate(`x[${JSON.stringify(name)}].to(${quoted})`, { x: made })
    return {
      downOutput: move('down_output'),
      output: move('output'),
      src2dst: move('src2dst'),
      topkIds: move('topk_ids'),
      topkWeights: move('topk_weights'),
    }
  }

  test(`torch tensors in, result in torch, on ${device}`, (t) => {
    const call = asTorch(3)
    t.is(postReorder({ ...call, startExpertId: 1, endExpertId: 2 }), call.output)
    const error = valueOf(
      '((d[s.view(6, 4)] * w[..., None] * ((i >= 1) & (i <= 2))[..., None]).sum(1) - o).abs().max().item()',
      { d: call.downOutput, s: call.src2dst, w: call.topkWeights, i: call.topkIds, o: call.output },
    ) as number
    t.true(error < 1e-5, String(error))
  })

  test(`torch tensors, Tensors and bare pymport objects may be mixed on ${device}`, (t) => {
    const call = asTorch(4)
    const pymport = createRequire(import.meta.url)('pymport') as {
      pymport: (name: string) => { get: (name: string) => { call: (...args: unknown[]) => unknown } }
      proxify: (object: unknown) => unknown
    }
    const bare = pymport.pymport('torch').get('zeros').call(24, 40) as {
      get: (name: string) => { call: (value: unknown) => unknown }
    }
    const there = bare.get('to').call(device)
    postReorder({ ...call, downOutput: there as never, topkWeights: Tensor.fromTorch(call.topkWeights) })
    t.is(valueOf('x.abs().max().item()', { x: call.output }), 0)
    postReorder(call)
    t.not(valueOf('x.abs().max().item()', { x: call.output }), 0)
    postReorder({ ...call, downOutput: pymport.proxify(there) as never })
    t.is(valueOf('x.abs().max().item()', { x: call.output }), 0)
  })

  test(`rows in DeepGEMM's layout, experts times slots, on ${device}`, (t) => {
    const call = validCall(device)
    const folded = call.downOutput.view([2, 3, 8])
    runPostReorder({ ...call, downOutput: folded }, device)
    t.deepEqual(read(call.output), validResult())
  })

  test(`src2dst may have the shape of the slots on ${device}`, (t) => {
    const call = validCall(device)
    runPostReorder({ ...call, src2dst: call.src2dst.view([3, 2]) }, device)
    t.deepEqual(read(call.output), validResult())
  })

  test(`without topkIds any negative src2dst is skipped on ${device}`, (t) => {
    const { topkIds: _, startExpertId: __, endExpertId: ___, ...call } = validCall(device)
    runPostReorder({ ...call, src2dst: on(device, new BigInt64Array([5n, -1n, -7n, 1n, -2n, -3n]), [6]) }, device)
    const rows = [2.5, 0.25, 0]
    const scale = [0.5, 0.25, 0]
    t.deepEqual(
      read(call.output),
      Array.from({ length: 24 }, (_, i) => rows[i >> 3]! + (scale[i >> 3]! * (i % 8)) / 8),
    )
  })

  test(`generation D's local ids: the default range takes every id from 0 on, on ${device}`, (t) => {
    const { startExpertId: _, endExpertId: __, ...call } = validCall(device)
    runPostReorder({ ...call, topkIds: on(device, new Int32Array([0, 1, 0, 1, 0, 1]), [3, 2]) }, device)
    t.deepEqual(read(call.output), validResult())
    const only = validCall(device)
    runPostReorder(
      { ...call, output: only.output, topkIds: on(device, new Int32Array([-1, -1, -1, -1, -1, -1]), [3, 2]) },
      device,
    )
    t.true(read(only.output).every((value) => Object.is(value, 0)))
  })

  test(`a token's bits do not depend on the other tokens on ${device}`, (t) => {
    const [T, K, H] = [33, 8, 264]
    using all = evaluate(`(torch.manual_seed(1), torch.randn(${T * K}, ${H}).to(torch.bfloat16).to(${quoted}))[1]`)
    using weights = evaluate(`torch.rand(${T}, ${K}).to(${quoted})`)
    using src2dst = evaluate(`torch.randperm(${T * K}, dtype=torch.int32).to(${quoted})`)
    using together = evaluate(`torch.empty(${T}, ${H}, dtype=torch.bfloat16, device=${quoted})`)
    using alone = evaluate(`torch.empty(${T}, ${H}, dtype=torch.bfloat16, device=${quoted})`)
    postReorder({ downOutput: all, output: together, src2dst, topkWeights: weights })
    for (const token of [0, 7, 32]) {
      const part = (name: string, step: number) =>
        evaluate(`x[${token * step}:${(token + 1) * step}]`, {
          x: name === 's' ? src2dst : name === 'w' ? weights : alone,
        })
      postReorder({ downOutput: all, output: part('o', 1), src2dst: part('s', K), topkWeights: part('w', 1) })
      t.true(valueOf(`torch.equal(a[${token}], b[${token}])`, { a: together, b: alone }))
    }
  })
}

test('results do not depend on the number of threads', (t) => {
  const run = (threads: number) => {
    setCpuThreads(threads)
    const output = Tensor.empty([50, 3000], { dtype: 'float16' })
    using downOutput = Tensor.from(
      Uint16Array.from({ length: 400 * 3000 }, (_, i) => (i * 2654435761) & 0x3bff),
      [400, 3000],
      { dtype: 'float16' },
    )
    using src2dst = Tensor.from(Int32Array.from({ length: 400 }, (_, i) => (i * 7) % 400))
    using topkWeights = Tensor.from(
      Float32Array.from({ length: 400 }, (_, i) => (i % 13) / 13),
      [50, 8],
    )
    postReorder({ downOutput, output, src2dst, topkWeights })
    return Buffer.from(output.data.buffer).toString('base64')
  }
  const single = run(1)
  t.is(run(2), single)
  t.is(run(7), single)
  setCpuThreads(0)
})

test('rows beyond 2^31 elements are found', (t) => {
  // The memory is only reserved: no page but those of the two rows below is ever touched.
  const [R, H] = [140000, 16384]
  using downOutput = Tensor.empty([R, H], { dtype: 'bfloat16' })
  t.true(downOutput.numel > 2 ** 31)
  const one = 0x3f80
  const rows = [R - 1, R - 2]
  for (const row of rows) {
    using view = downOutput.view([H], row * H)
    view.data.fill(one as never)
  }
  using output = Tensor.empty([1, H], { dtype: 'bfloat16' })
  postReorder({
    downOutput,
    output,
    src2dst: Tensor.from(new Int32Array(rows)),
    topkWeights: Tensor.from(new Float32Array([0.5, 0.25]), [1, 2]),
  })
  t.true((output.data as Uint16Array).every((bits) => bits === 0x3f40))
})

test('a factor multiplies the sum, and T = 0 is no work', (t) => {
  const call = validCall()
  postReorder({ ...call, routedScalingFactor: 4 })
  t.deepEqual(
    read(call.output),
    validResult().map((value) => value * 4),
  )
  const empty = Tensor.empty([0, 8])
  t.is(
    postReorder({
      ...call,
      output: empty,
      src2dst: Tensor.empty([0], { dtype: 'int32' }),
      topkIds: Tensor.empty([0, 2], { dtype: 'int32' }),
      topkWeights: Tensor.empty([0, 2]),
    }),
    empty,
  )
})
