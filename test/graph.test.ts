import test from 'ava'
import {
  epGather,
  epScatter,
  geluAndMul,
  kw,
  moeSumReduce,
  type PyRef,
  postReorder,
  preprocess,
  preReorder,
  shuffleMulSum,
  siluAndMul,
} from 'epmoe'
import { gpu } from './helpers/devices.js'
import { evaluate, python, torch, valueOf } from './helpers/python.js'

const gpuTest = gpu === undefined ? test.skip : test

/** Every tensor of a run through all ops, in torch's memory; the inputs are drawn by `draw`. */
class Path {
  readonly tensors: Record<string, PyRef>

  constructor(
    readonly T: number,
    readonly K: number,
    readonly E: number,
  ) {
    const [H, I, M] = [512, 256, E * 128 * Math.ceil(T / 128)]
    const make = (code: string) => evaluate(code, { T, K, E, H, I, M, R: T * K })
    const bf16 = 'dtype=torch.bfloat16, device="cuda"'
    this.tensors = {
      topkIds: make('torch.empty(T, K, dtype=torch.int64, device="cuda")'),
      input: make(`torch.empty(T, H, ${bf16})`),
      weights: make('torch.empty(T, K, device="cuda")'),
      src2dst: make('torch.empty(R, dtype=torch.int32, device="cuda")'),
      segIndptr: make('torch.empty(E + 1, dtype=torch.int64, device="cuda")'),
      reorderTopkIds: make('torch.empty(R, dtype=torch.int64, device="cuda")'),
      maskedM: make('torch.empty(E, dtype=torch.int32, device="cuda")'),
      gateupInput: make(`torch.zeros(R, H, ${bf16})`),
      quantised: make('torch.zeros(R, H, dtype=torch.float8_e4m3fn, device="cuda")'),
      quantisedScales: make('torch.zeros(R, H // 128, device="cuda")'),
      rowScales: make('torch.zeros(R, 1, device="cuda")'),
      rowQuantised: make('torch.zeros(R, H, dtype=torch.float8_e4m3fn, device="cuda")'),
      silu: make(`torch.zeros(R, I, ${bf16})`),
      gelu: make(`torch.zeros(R, I, ${bf16})`),
      output: make(`torch.zeros(T, H, ${bf16})`),
      shuffled: make(`torch.zeros(T, H, ${bf16})`),
      summed: make(`torch.zeros(T, H, ${bf16})`),
      reserved: make('torch.full((E,), M // E, dtype=torch.int32, device="cuda")'),
      startLoc: make('torch.empty(E, dtype=torch.int32, device="cuda")'),
      scattered: make(`torch.zeros(M, H, ${bf16})`),
      mIndices: make('torch.empty(M, dtype=torch.int32, device="cuda")'),
      outputIndex: make('torch.empty(T, K, dtype=torch.int32, device="cuda")'),
      gathered: make(`torch.zeros(T, H, ${bf16})`),
    }
  }

  /** New inputs in the same memory, as a serving stack feeds a captured graph. */
  draw(seed: number): void {
    python
      .eval(
        '[torch.manual_seed(seed), ids.copy_(torch.randint(-1, E, ids.shape)), x.normal_(), w.uniform_(), ' +
          '[z.zero_() for z in outputs]]',
        {
          torch,
          seed,
          E: this.E,
          ids: this.tensors['topkIds'],
          x: this.tensors['input'],
          w: this.tensors['weights'],
          outputs: Object.values(this.#outputs()),
        },
      )
      .dispose()
  }

  run(): void {
    const t = this.tensors as Record<string, PyRef> & Record<'topkIds' | 'src2dst' | 'input' | 'weights', PyRef>
    const of = (name: string) => t[name] as PyRef
    preprocess({
      topkIds: t.topkIds,
      src2dst: t.src2dst,
      segIndptr: of('segIndptr'),
      reorderTopkIds: of('reorderTopkIds'),
      maskedM: of('maskedM'),
    })
    const slots = { src2dst: t.src2dst, topkIds: t.topkIds, startExpertId: 0, endExpertId: this.E - 1 }
    preReorder({ input: t.input, gateupInput: of('gateupInput'), ...slots })
    preReorder({
      input: t.input,
      gateupInput: of('quantised'),
      ...slots,
      outputScales: of('quantisedScales'),
      quantization: 'group',
    })
    preReorder({
      input: t.input,
      gateupInput: of('rowQuantised'),
      ...slots,
      outputScales: of('rowScales'),
      quantization: 'token',
    })
    const rows = { gateupOutput: of('gateupInput'), reorderTopkIds: of('reorderTopkIds'), endExpertId: this.E - 1 }
    siluAndMul({ ...rows, downInput: of('silu') })
    geluAndMul({ ...rows, downInput: of('gelu') })
    postReorder({
      downOutput: of('gateupInput'),
      output: of('output'),
      ...slots,
      topkWeights: t.weights,
      residual: t.input,
    })
    shuffleMulSum({ input: of('gateupInput'), output: of('shuffled'), permutation: t.src2dst, factors: t.weights })
    const [T, K] = [this.T, this.K]
    using cube = of('gateupInput').method('view', T, K, 512)
    moeSumReduce({ input: cube, output: of('summed') })
    epScatter({
      recvX: t.input,
      recvTopk: t.topkIds,
      numRecvTokensPerExpert: of('reserved'),
      expertStartLoc: of('startLoc'),
      outputTensor: of('scattered'),
      mIndices: of('mIndices'),
      outputIndex: of('outputIndex'),
    })
    epGather({
      inputTensor: of('scattered'),
      recvTopkIds: t.topkIds,
      recvTopkWeight: t.weights,
      inputIndex: of('outputIndex'),
      outputTensor: of('gathered'),
    })
  }

  #outputs(): Record<string, PyRef> {
    const { topkIds: _ids, input: _input, weights: _weights, reserved: _reserved, ...outputs } = this.tensors
    return outputs
  }

  /** A checksum of the bytes of every output, by name. */
  digest(): Record<string, number> {
    const sum =
      '(x.contiguous().view(torch.uint8).long() * (torch.arange(x.nbytes, device=x.device) % 65521).view(-1)' +
      '.view(x.contiguous().view(torch.uint8).shape)).sum().item()'
    return Object.fromEntries(Object.entries(this.#outputs()).map(([name, x]) => [name, valueOf(sum, { x }) as number]))
  }
}

for (const [T, K, E] of [
  [5, 4, 16],
  [1500, 8, 64],
] as const) {
  gpuTest(`every op captures into a CUDA graph from TypeScript and replays on new inputs, T = ${T}`, (t) => {
    const path = new Path(T, K, E)
    path.draw(1)
    using graph = torch.get('cuda').method('CUDAGraph')
    using context = torch.get('cuda').method('graph', graph)
    context.method('__enter__').dispose()
    try {
      path.run()
    } finally {
      context.method('__exit__', null, null, null).dispose()
    }
    for (const seed of [2, 3]) {
      path.draw(seed)
      const untouched = path.digest()
      graph.method('replay').dispose()
      const replayed = path.digest()
      path.draw(seed)
      path.run()
      t.deepEqual(replayed, path.digest())
      for (const [name, sum] of Object.entries(replayed)) t.not(sum, untouched[name], `${name} was not written`)
    }
    torch.get('cuda').method('synchronize', kw({})).dispose()
  })
}
