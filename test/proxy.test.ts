import { mkdirSync, mkdtempSync, utimesSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import test from 'ava'
import { EpmoeError, kw, PythonError, postReorder, scope, Tensor, type TorchTensor } from 'epmoe'
import { python } from './helpers/python.js'

const torch = python.torch()

test('torch is used as from Python: attributes, calls, keyword arguments, numbers', (t) => {
  const x = torch.arange(6, kw({ dtype: torch.float32 })).view(2, 3)
  t.deepEqual(x.shape, [2, 3])
  t.is(x.sum().item(), 15)
  t.deepEqual(x.mul(2).flatten().tolist(), [0, 2, 4, 6, 8, 10])
  t.is(String(x.dtype), 'torch.float32')
  t.true(torch.equal(x.t().contiguous(), torch.stack([x.select(0, 0), x.select(0, 1)], 1)))
  const [values, indices] = torch.topk(x.flatten(), 2) as unknown as [typeof x, typeof x]
  t.deepEqual(
    [values.tolist(), indices.tolist()],
    [
      [5, 4],
      [5, 4],
    ],
  )
  t.is(x.grad, null)
  t.regex(torch.__version__, /^\d+\.\d+/)
})

test('a proxy may be iterated, awaited without harm, tested for attributes, and written to', async (t) => {
  t.deepEqual(
    [...torch.arange(3)].map((item) => (item as { item(): number }).item()),
    [0, 1, 2],
  )
  // An await asks any object for a then.
  const awaited = await (torch.ones(2) as unknown as Promise<TorchTensor>)
  t.is(awaited.sum().item(), 2)
  const holder = python.exec('class C: pass\nholder = C()').proxy<{ holder: { x?: number } }>().holder
  t.false('x' in holder)
  holder.x = 5
  t.is(holder.x, 5)
})

test('proxies are tensors to ops and to Tensor.fromTorch, and arguments to Python', (t) => {
  const downOutput = torch.ones(4, 8)
  const output = torch.zeros(2, 8)
  postReorder({ downOutput, output, src2dst: torch.arange(4), topkWeights: torch.full([2, 2], 0.5) })
  t.is(output.sum().item(), 16)
  using tensor = Tensor.fromTorch(output)
  t.deepEqual(tensor.shape, [2, 8])
  t.is(python.eval('x.sum().item()', { x: output }).toJS(), 16)
})

test('errors are those of the bridge', (t) => {
  t.is(t.throws(() => torch.ones(2).view(3), { instanceOf: PythonError })?.pythonType, 'RuntimeError')
  t.is(t.throws(() => torch['no_such_thing'], { instanceOf: PythonError })?.pythonType, 'AttributeError')
  const x = torch.ones(2)
  x[Symbol.dispose]()
  t.is(t.throws(() => x.sum(), { instanceOf: EpmoeError })?.code, 'ERR_DISPOSED')
})

test('a scope ends what chains of calls made on the way', (t) => {
  const result = scope(() => torch.ones(3).mul(2).add(1).sum().item())
  t.is(result, 9)
})

test('reload: a changed module is read again, its submodules first', (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'epmoe-reload-'))
  mkdirSync(join(folder, 'reloaded_package'))
  const write = (part: string, text: string, age: number) => {
    const path = join(folder, 'reloaded_package', part)
    writeFileSync(path, text)
    utimesSync(path, 1_000_000 + age, 1_000_000 + age) // Python looks at the second of a file's time
  }
  write('inner.py', 'value = 1', 0)
  write('__init__.py', 'from reloaded_package.inner import value', 0)
  python.import('sys').get('path').method('insert', 0, folder)
  const module = python.import('reloaded_package')
  t.is(module.get('value').toJS(), 1)
  write('inner.py', 'value = 22', 5)
  t.is(python.reload(module).get('value').toJS(), 22)
})
