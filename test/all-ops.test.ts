// Every op, by its own descriptor: what a call may get wrong, tried on the calls that parity knows to be right.
import test from 'ava'
import { type Device, EpmoeError, type OpInfo, type OpParam, ops, Stream, Tensor } from 'epmoe'
import { Op } from '../src/call.js'
import { camelCase } from '../src/errors.js'
import type { Case } from '../src/parity/case.js'
import { Guarded } from '../src/parity/guard.js'
import { loadCases } from '../src/parity/run.js'
import { testDevices } from './helpers/devices.js'

const families = await loadCases()

/** A call that is right, with its outputs poisoned, and what it should leave in them. */
class Call implements Disposable {
  readonly op: Op
  readonly inputs: Record<string, Guarded>
  readonly outputs: Record<string, Guarded>
  readonly scalars: Record<string, number | string>
  readonly #device: Device

  constructor(each: Case, device: Device) {
    const { op } = each
    const problem = each.build()
    this.op = new Op(op)
    this.#device = device
    const there = (tensors: Record<string, Guarded>) =>
      Object.fromEntries(Object.entries(tensors).map(([name, tensor]) => [name, tensor.to(device)]))
    this.inputs = there(problem.inputs)
    this.outputs = there(problem.outputs())
    this.scalars = problem.scalars
  }

  get args(): Record<string, unknown> {
    const tensors = Object.entries({ ...this.inputs, ...this.outputs }).map(([name, { tensor }]) => [name, tensor])
    return Object.fromEntries(
      [...tensors, ...Object.entries(this.scalars)].map(([name, value]) => [camelCase(name as string), value]),
    )
  }

  run(args = this.args): void {
    this.op.call(args)
    if (this.#device !== 'cpu') Stream.own(this.#device).synchronizeSync()
  }

  /** The bytes of every output, and whether the zones around them are untouched. */
  state(): string {
    return Object.values(this.outputs)
      .map((output) => {
        const { host, intact } = output.read()
        const { buffer, byteOffset, byteLength } = host.tensor.data
        const text = `${intact} ${Buffer.from(buffer as ArrayBuffer, byteOffset, byteLength).toString('base64')}`
        host[Symbol.dispose]()
        return text
      })
      .join('\n')
  }

  [Symbol.dispose](): void {
    for (const tensor of Object.values({ ...this.inputs, ...this.outputs })) tensor[Symbol.dispose]()
  }
}

interface Mistake {
  title: string
  /** The mistaken arguments; undefined where this parameter cannot be got wrong so. */
  make: (args: Record<string, unknown>, param: OpParam, device: Device) => Record<string, unknown> | undefined
  codes: string[]
}

const like = (tensor: Tensor, shape: readonly number[], dtype = tensor.dtype) =>
  Tensor.zeros(shape, { dtype, device: tensor.device })

/** Changes the tensor that is passed for the parameter. */
function changed(change: (tensor: Tensor) => Tensor | undefined) {
  return (args: Record<string, unknown>, { name }: OpParam) => {
    const tensor = args[camelCase(name)] as Tensor
    const other = change(tensor)
    return other === undefined ? undefined : { ...args, [camelCase(name)]: other }
  }
}

const tensorMistakes: Mistake[] = [
  {
    title: 'missing',
    make: (args, { name, optional }) => (optional ? undefined : { ...args, [camelCase(name)]: undefined }),
    codes: ['ERR_MISSING_ARGUMENT'],
  },
  {
    title: 'a number',
    make: (args, { name }) => ({ ...args, [camelCase(name)]: 5 }),
    codes: ['ERR_NOT_A_TENSOR'],
  },
  {
    title: 'of a dtype that no op takes',
    make: changed((tensor) => like(tensor, tensor.shape, 'float64')),
    codes: ['ERR_DTYPE'],
  },
  {
    title: 'of one axis too many',
    // A leading axis folds into the rows where the op says so: a trailing one fits nowhere.
    make: changed((tensor) => like(tensor, [...tensor.shape, 2, 13])),
    codes: ['ERR_RANK', 'ERR_SHAPE', 'ERR_OVERLAP'],
  },
  {
    title: 'one element longer',
    make: changed((tensor) => like(tensor, [...tensor.shape.slice(0, -1), (tensor.shape.at(-1) ?? 0) + 1])),
    codes: ['ERR_SHAPE', 'ERR_RANK', 'ERR_INDEX_OUT_OF_RANGE'],
  },
  {
    title: 'disposed',
    make: changed((tensor) => {
      const other = like(tensor, tensor.shape)
      other.dispose()
      return other
    }),
    codes: ['ERR_DISPOSED'],
  },
]

const known = new Set([
  'scales',
  'a1_scales',
  'm_indices',
  'output_tensor',
  'num_recv_tokens_per_expert',
  'masked_m',
  'reorder_topk_ids',
  'seg_indptr',
])

/** A case with something in every tensor, small enough for the whole grid of mistakes. */
function sample(op: OpInfo): Case[] {
  const cases = families.find((family) => family.op === op.name)?.standard() ?? []
  return cases.filter(
    ({ axes, tags }) => axes['T']! > 0 && axes['T']! < 30 && axes['H']! < 1100 && !tags.includes('special'),
  )
}

for (const device of testDevices) {
  for (const op of ops()) {
    test(`${op.name}: each argument, got wrong in each way, is named, and nothing is written, on ${device}`, (t) => {
      let tried = 0
      for (const each of sample(op).slice(0, 12)) {
        using call = new Call(each, device)
        const { args } = call
        for (const param of op.params.filter(
          ({ kind, name }) => kind === 'tensor' && args[camelCase(name)] !== undefined,
        )) {
          for (const { title, make, codes } of tensorMistakes) {
            const mistaken = make(args, param, device)
            // One element more of these is a longer table, which is as good.
            if (mistaken === undefined || (title === 'one element longer' && known.has(param.name))) continue
            const before = call.state()
            const error = t.throws(
              () => call.run(mistaken),
              { instanceOf: EpmoeError },
              `${param.name} ${title}: ${each.name}`,
            )
            t.true(codes.includes(error?.code ?? ''), `${param.name} ${title}: ${error?.code} ${error?.message}`)
            t.is(error?.op, camelCase(op.name))
            t.not(error?.argument, '')
            for (const text of [error?.expected, error?.received]) t.not(text, '')
            if (error?.code !== 'ERR_INDEX_OUT_OF_RANGE') t.is(call.state(), before, `${param.name} ${title} wrote`)
            tried++
          }
        }
        for (const param of op.params.filter(({ kind }) => kind !== 'tensor')) {
          for (const value of param.kind === 'enum'
            ? ['nonsense', 3]
            : ['x', Number.NaN, Number.POSITIVE_INFINITY, 1e300]) {
            const error = t.throws(() => call.run({ ...args, [camelCase(param.name)]: value }), {
              instanceOf: EpmoeError,
            })
            t.is(error?.code, 'ERR_VALUE')
            t.is(error?.argument, camelCase(param.name))
            tried++
          }
        }
        const error = t.throws(() => call.run({ ...args, surplus: 1 }), { instanceOf: EpmoeError })
        t.is(error?.code, 'ERR_UNEXPECTED_ARGUMENT')
      }
      t.true(tried > 30, `${tried} mistakes`)
    })

    test(`${op.name}: an output that overlaps an input is refused, on ${device}`, (t) => {
      const [each] = sample(op)
      using call = new Call(each!, device)
      const { args } = call
      for (const param of op.params.filter(({ role, name }) => role === 'out' && args[camelCase(name)] !== undefined)) {
        const output = args[camelCase(param.name)] as Tensor
        // One memory that holds both, the output a few bytes into it.
        for (const other of op.params.filter(({ kind, name }) => kind === 'tensor' && name !== param.name)) {
          const input = args[camelCase(other.name)] as Tensor | undefined
          if (input === undefined || input.dtype !== output.dtype || input.nbytes === 0 || output.nbytes === 0) continue
          const memory = Tensor.zeros([input.numel + output.numel], { dtype: input.dtype, device })
          const overlapping = {
            ...args,
            [camelCase(other.name)]: memory.view(input.shape),
            [camelCase(param.name)]: memory.view(output.shape, input.numel - 1),
          }
          const error = t.throws(() => call.run(overlapping), { instanceOf: EpmoeError })
          t.is(error?.code, 'ERR_OVERLAP', error?.message)
        }
      }
      t.pass()
    })

    test(`${op.name}: the same call gives the same bits, whatever the threads and however often, on ${device}`, (t) => {
      for (const each of sample(op).slice(0, 6)) {
        using first = new Call(each, device)
        using second = new Call(each, device)
        first.run()
        second.run()
        second.run()
        t.is(second.state(), first.state(), each.name)
        t.true(first.state().startsWith('true'))
      }
    })

    test(`${op.name}: indices out of range are told, and nothing outside is touched, on ${device}`, (t) => {
      let met = 0
      for (const each of sample(op)) {
        using call = new Call(each, device)
        for (const param of op.params) {
          const input = call.inputs[param.name]
          const whole = param.role === 'in' && input !== undefined && ['int32', 'int64'].includes(input.tensor.dtype)
          if (!whole || input.tensor.numel === 0) continue
          const other = Guarded.create(input.tensor.shape, input.tensor.dtype)
          const { data } = other.tensor
          const host = input.tensor.toHostSync()
          data.set(host.data as never)
          const worst = 2 ** 31 - 1
          for (let i = 0; i < data.length; i += 3)
            data[i] = (data instanceof BigInt64Array ? BigInt(worst) : worst) as never
          try {
            call.run({ ...call.args, [camelCase(param.name)]: other.to(device).tensor })
          } catch (error) {
            if (!(error instanceof EpmoeError)) throw error
            t.true(['ERR_INDEX_OUT_OF_RANGE', 'ERR_SHAPE', 'ERR_VALUE'].includes(error.code), error.message)
            met++
          }
          t.true(
            call
              .state()
              .split('\n')
              .every((line) => line.startsWith('true')),
            `${param.name} of ${each.name}`,
          )
        }
      }
      t.true(met > 0 || op.name === 'moe_sum_reduce' || op.name.endsWith('and_mul'), 'no index was ever refused')
    })
  }
}
