import test from 'ava'
import { EpmoeError, float, kw, type PyRef, PythonError, startPython } from 'epmoe'
import { evaluate, python, valueOf } from './helpers/python.js'

const same: [string, unknown, unknown?][] = [
  ['a small float', 1e-8],
  ['a float just under a whole', 0.99999999],
  ['a whole number', 7],
  ['the largest exact integer', Number.MAX_SAFE_INTEGER],
  ['a large float', 1e20],
  ['negative zero', -0],
  ['NaN', Number.NaN],
  ['infinity', Number.NEGATIVE_INFINITY],
  ['2^63', 2n ** 63n],
  ['a long negative integer', -(10n ** 40n)],
  ['true', true],
  ['null', null],
  ['undefined, which is None', undefined, null],
  ['text', 'plain'],
  ['text beyond the basic plane', '😀abc€'],
  ['text with quotes, newlines and NUL', '"\\\n\0'],
  ['nested containers', [1, [2.5, 'x', [null, false]], { a: { b: [1e-8] } }]],
  [
    'a Map, as a dict with its own keys',
    new Map<unknown, unknown>([
      [1, 'one'],
      [2.5, null],
    ]),
  ],
  ['a small bigint, which is a number again', 5n, 5],
]
for (const [what, value, expected = value] of same) {
  test(`${what} arrives and returns as it is`, (t) => {
    t.deepEqual(valueOf('x', { x: value }), expected)
  })
}

test('numbers arrive as the type they are meant to be', (t) => {
  t.deepEqual(valueOf('[type(v).__name__ for v in x]', { x: [1, 1.5, float(1), 1e20, -0, 2n, true] }), [
    'int',
    'float',
    'float',
    'float',
    'float',
    'int',
    'bool',
  ])
})

test('typed arrays arrive as memory, not as copies', (t) => {
  const array = new Float32Array([1, 2, 3])
  const tensor = evaluate('torch.frombuffer(x, dtype=torch.float32)', { x: array })
  array[1] = 20
  t.deepEqual(tensor.method('tolist').toJS(), [1, 20, 3])
})

for (const value of [new Date(), Symbol('x'), /x/, new (class Own {})(), Promise.resolve()]) {
  test(`${Object.prototype.toString.call(value)} has no Python counterpart`, (t) => {
    t.is(t.throws(() => valueOf('x', { x: value }), { instanceOf: EpmoeError })?.code, 'ERR_PYTHON_ARGUMENT')
  })
}

test('what has no JavaScript counterpart is refused with its type', (t) => {
  const error = t.throws(() => valueOf('{1, 2}'), { instanceOf: PythonError })
  t.is(error?.pythonType, 'TypeError')
  t.regex(error?.message ?? '', /set has no JavaScript counterpart/)
})

const exceptions: [string, string, RegExp][] = [
  ['1 / 0', 'ZeroDivisionError', /division/],
  ['torch.matmul(torch.ones(2, 3), torch.ones(2, 3))', 'RuntimeError', /cannot be multiplied/],
  ['x ==', 'SyntaxError', /invalid syntax/],
  ['__import__("no_such_module")', 'ModuleNotFoundError', /no_such_module/],
  ['exec("raise SystemExit(3)")', 'SystemExit', /3/],
  ['exec("raise KeyboardInterrupt()")', 'KeyboardInterrupt', /KeyboardInterrupt/],
  ['exec("class E(Exception):\\n def __str__(self): raise ValueError\\nraise E()")', 'E', /unprintable/],
]
for (const [source, type, message] of exceptions) {
  test(`${type} arrives as PythonError with type, message and traceback`, (t) => {
    const error = t.throws(() => evaluate(source), { instanceOf: PythonError })
    t.is(error?.pythonType, type)
    t.regex(error?.message ?? '', message)
    t.is(error?.code, 'ERR_PYTHON_EXCEPTION')
    t.is(valueOf('40 + 2'), 42)
  })
}

test('a traceback shows the causes and the lines of inline modules', (t) => {
  const module = python.exec(
    'def outer():\n    try:\n        1 / 0\n    except ZeroDivisionError as e:\n        raise KeyError("k") from e\n',
  )
  const error = t.throws(() => module.method('outer'), { instanceOf: PythonError })
  t.regex(
    error?.traceback ?? '',
    /ZeroDivisionError[\s\S]*direct cause[\s\S]*raise KeyError\("k"\) from e[\s\S]*KeyError/,
  )
})

test('a JavaScript error that passes through Python keeps its identity', (t) => {
  const mine = new RangeError('mine')
  const thrower = () => {
    throw mine
  }
  const error = t.throws(() => valueOf('(lambda: f(1))()', { f: thrower }), { instanceOf: PythonError })
  t.is(error?.cause, mine)
  t.is(error?.pythonType, 'JavaScriptError')
})

test('JavaScript functions are called with Python objects and may return anything', (t) => {
  const seen: unknown[] = []
  const f = (x: PyRef) => {
    seen.push(x.toJS())
    return null
  }
  t.deepEqual(valueOf('[f(1), f("two"), f([3.5])]', { f }), [null, null, null])
  t.deepEqual(seen, [1, 'two', [3.5]])
  t.deepEqual(valueOf('sorted([3, 1, 2], key=f)', { f: (x: PyRef) => -(x.toJS() as number) }), [3, 2, 1])
})

test('iterators raise what Python raises', (t) => {
  const generator = python.exec('def g():\n    yield 1\n    raise ValueError("after one")\n').method('g')
  const seen: unknown[] = []
  const error = t.throws(
    () => {
      for (const item of generator) seen.push(item.toJS())
    },
    { instanceOf: PythonError },
  )
  t.deepEqual(seen, [1])
  t.is(error?.pythonType, 'ValueError')
  t.deepEqual(
    [...evaluate('range(3)')].map((item) => item.toJS()),
    [0, 1, 2],
  )
})

test('an object whose __len__ raises poisons nothing', (t) => {
  const module = python.exec('class C:\n    def __len__(self): raise RuntimeError("len boom")\n    x = 5\n')
  const object = module.method('C')
  t.is(object.get('x').toJS(), 5)
  t.is(valueOf('1 + 1'), 2)
  t.regex(t.throws(() => object.length, { instanceOf: PythonError })?.message ?? '', /len boom/)
})

test('attributes, items, keyword arguments', (t) => {
  const dict = evaluate('{"a": 1}')
  dict.setItem('b', [2])
  t.deepEqual(dict.toJS(), { a: 1, b: [2] })
  t.is(dict.item('a').toJS(), 1)
  t.is(dict.length, 2)
  const object = python.exec('class C: pass\n').method('C')
  object.set('name', 'é')
  t.is(object.get('name').toJS(), 'é')
  t.deepEqual(
    python
      .import('builtins')
      .method('dict', kw({ one: 1, text: 'x' }))
      .toJS(),
    { one: 1, text: 'x' },
  )
  t.is(t.throws(() => object.get('absent'), { instanceOf: PythonError })?.pythonType, 'AttributeError')
})

test('100,000 calls with null, booleans and floats, and as many results', (t) => {
  const identity = evaluate('lambda *a: None')
  for (let i = 0; i < 25000; i++) identity.call(null, true, false, 1e-8).dispose()
  const callback = evaluate('lambda f: [f(i) for i in range(20000)][-1]')
  t.is(callback.call(() => null).toJS(), null)
  t.is(valueOf('[None, True, False]')?.toString(), ',true,false')
})

test('a disposed reference is an error, and disposing lets go at once', (t) => {
  const module = python.exec('import weakref\nclass C: pass\nc = C()\nw = weakref.ref(c)\n')
  const held = module.get('c')
  module.set('c', null)
  t.is(valueOf('m.w() is None', { m: module }), false)
  held.dispose()
  held.dispose()
  t.is(valueOf('m.w() is None', { m: module }), true)
  t.is(t.throws(() => held.get('x'), { instanceOf: EpmoeError })?.code, 'ERR_DISPOSED')
})

test('Triton kernels and spawned processes find their source and interpreter', (t) => {
  t.is(valueOf('__import__("sys").executable'), python.executable)
  t.is(valueOf('__import__("multiprocessing").get_start_method()'), 'spawn')
  t.is(process.env['PYTHONEXECUTABLE'], undefined)
  t.is(valueOf('__import__("os").environ.get("PYTHONEXECUTABLE")'), null)
  t.regex(python.version, /^3\.\d+\.\d+$/)
})

test('Python starts once', (t) => {
  t.is(startPython(), python)
})
