import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
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

test('containers that contain themselves, or are deeper than Python recurses, are refused', (t) => {
  const cyclic: unknown[] = []
  cyclic.push({ inner: cyclic })
  let deep: unknown = 1
  for (let i = 0; i < 5000; i++) deep = i % 2 === 0 ? [deep] : new Map([['x', deep]])
  for (const x of [cyclic, deep]) {
    t.is(t.throws(() => valueOf('x', { x }), { instanceOf: EpmoeError })?.code, 'ERR_PYTHON_ARGUMENT')
  }
  let within: unknown = 1
  for (let i = 0; i < 150; i++) within = [within]
  t.deepEqual(valueOf('x', { x: within }), within)
  const error = t.throws(() => valueOf('(l := [], l.append(l), l)[-1]'), { instanceOf: PythonError })
  t.is(error?.pythonType, 'RecursionError')
})

test('text with half a surrogate pair, and names that JavaScript treats specially, arrive as they are', (t) => {
  t.is(valueOf('x', { x: 'a\ud800b' }), 'a\ud800b')
  const special = JSON.parse('{"__proto__": 1, "$": ["box", 0], "toString": 2}') as Record<string, unknown>
  t.deepEqual(valueOf('sorted(x)', { x: special }), ['$', '__proto__', 'toString'])
  t.deepEqual(valueOf('x', { x: special }), special)
})

test('an argument that a later one disposes of is refused, whatever its memory has become', (t) => {
  const identity = evaluate('lambda *values: values')
  const list = evaluate('[1, 2]')
  const treacherous = {
    get key() {
      list.dispose()
      return 1
    },
  }
  t.throws(() => identity.call(list, treacherous), { code: 'ERR_DISPOSED' })
  t.is(identity.call(1, 2).length, 2)
})

test('a key that cannot be one is the TypeError that Python has for it', (t) => {
  const error = t.throws(() => valueOf('x', { x: new Map([[[1], 2]]) }), { instanceOf: PythonError })
  t.is(error?.pythonType, 'TypeError')
  t.regex(error?.message ?? '', /unhashable type: 'list'/)
})

test('no reference is lost or kept by what crosses', async (t) => {
  const count = evaluate('lambda x: __import__("sys").getrefcount(x)')
  const marker = evaluate('object()')
  const identity = evaluate('lambda *values, **named: values[0]')
  const throwing = evaluate('lambda x: {}[x]')
  const calling = evaluate('lambda f, x: f(x)')
  const constants = ['None', 'True', 'False', '0', '1.5', '"text"', '()'].map((each) => evaluate(each))
  const counts = async () => {
    // pymport holds what it gave to functions until JavaScript's collector comes to it, and frees it in a later turn.
    setFlagsFromString('--expose-gc')
    const collect = runInNewContext('gc') as () => void
    for (let round = 0; round < 4; round++) {
      collect()
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
    evaluate('__import__("gc").collect()').dispose()
    return [marker, ...constants].map((each) => count.call(each).toJS() as number)
  }
  const before = await counts()
  for (let i = 0; i < 1000; i++) {
    identity.call(marker, [marker, { a: marker }], kw({ named: new Map([[marker, marker]]) })).dispose()
    for (const constant of constants) identity.call(constant).dispose()
    for (const value of [null, true, false, 0, 1.5, 'text']) identity.call(value).dispose()
    t.throws(() => throwing.call(marker), { instanceOf: PythonError })
    t.throws(() => identity.call(marker, new Map([[[marker], marker]])), { instanceOf: PythonError })
  }
  const after = await counts()
  // A reference that a single kind of value lost or gained would be a thousand here.
  for (const [i, each] of after.entries()) t.true(Math.abs(each - before[i]!) < 500, `${i}: ${before[i]}, then ${each}`)
  // Each function given to Python adds one to None's count, in pymport, which nobody will miss.
  for (let i = 0; i < 1000; i++) {
    calling
      .call((given: PyRef) => {
        given.dispose()
        return marker
      }, marker)
      .dispose()
  }
  t.true((await counts())[0]! < before[0]! + 500)
})

test('keyword arguments that Python gives a JavaScript function come last, as a dict', (t) => {
  const seen: unknown[] = []
  evaluate('lambda f: f(1, b=2)').call((...args: PyRef[]) => {
    seen.push(...args.map((each) => each.toJS()))
  })
  t.deepEqual(seen, [1, { b: 2 }])
})

test('a long row of arguments, and a long text, arrive whole', (t) => {
  const many = Array.from({ length: 5000 }, (_, i) => i)
  t.deepEqual(valueOf('x', { x: many }), many)
  for (const length of [126, 127, 128, 129, 70_000]) {
    const text = `\ufeff${'ä'.repeat(length - 1)}`
    t.is(valueOf('x', { x: text }), text)
  }
})

test('a thread that needs JavaScript while JavaScript waits for it gets an error instead of waiting forever', (t) => {
  const bridge = python.import('epmoe._bridge')
  bridge.set('patience', float(0.3))
  const work = python.exec(`
import threading, queue
def joined(f):
    errors = queue.Queue()
    def run():
        try: errors.put(f(1))
        except BaseException as error: errors.put(str(error))
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return errors.get()
`)
  t.regex(work.method('joined', () => 5).toJS() as string, /neither could go on.*callAsync/)
  bridge.set('patience', float(10))
})

test('the same from an asynchronous call works, and beside a synchronous one that ends', async (t) => {
  const work = python.exec(`
import threading
def joined(f):
    results = []
    thread = threading.Thread(target=lambda: results.append(f(1)))
    thread.start()
    thread.join()
    return results
`)
  const result = work.methodAsync('joined', () => 5)
  valueOf('__import__("time").sleep(0.05)')
  t.deepEqual((await result).toJS(), [5])
})

test('errors of JavaScript functions that Python swallows are not kept for ever', async (t) => {
  setFlagsFromString('--expose-gc')
  const collect = runInNewContext('gc') as () => void
  const quiet = python.exec('def quiet(f):\n    try: f()\n    except Exception: pass\n')
  const swallowed: WeakRef<Error>[] = []
  const thrower = () => {
    const error = new RangeError('swallowed')
    swallowed.push(new WeakRef(error))
    throw error
  }
  for (let i = 0; i < 1500; i++) quiet.method('quiet', thrower).dispose()
  let left: Error | undefined
  for (let round = 0; round < 50; round++) {
    await new Promise((resolve) => setTimeout(resolve, 5)) // what was looked at is kept until its turn ends
    collect()
    left = swallowed[0]?.deref()
    if (left === undefined) break
  }
  t.is(left, undefined)
})

test('inline modules show their source to whoever inspects it, as Triton does', (t) => {
  const module = python.exec('def f():\n    return 5\n')
  t.is(valueOf('__import__("inspect").getsource(f)', { f: module.get('f') }), 'def f():\n    return 5\n')
})

test('Python’s ssl runs on Node’s OpenSSL, of one major version, and finds certificates', (t) => {
  const version = valueOf('__import__("ssl").OPENSSL_VERSION') as string
  t.is(/OpenSSL (\d+)\./.exec(version)?.[1], process.versions['openssl']?.split('.')[0])
  if (process.env['SSL_CERT_FILE'] === undefined) return
  t.true(valueOf('len(__import__("ssl").create_default_context().get_ca_certs()) > 0'))
})
