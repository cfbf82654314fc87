import { readdirSync, readFileSync } from 'node:fs'
import { join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import test from 'ava'
import { generated } from '../src/generate/index.js'

const root = fileURLToPath(new URL('..', import.meta.url))

function sources(folder: string, extension: RegExp): { file: string; text: string }[] {
  return readdirSync(join(root, folder), { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile() && extension.test(entry.name))
    .map((entry) => join(entry.parentPath, entry.name))
    .map((path) => ({ file: relative(root, path), text: readFileSync(path, 'utf8') }))
}

/** The files whose text matches, which must be exactly those allowed. */
function matching(files: { file: string; text: string }[], pattern: RegExp): string[] {
  return files.filter(({ text }) => pattern.test(text)).map(({ file }) => file)
}

test('the library knows nothing of Node, Python or torch', (t) => {
  const native = sources('csrc', /\.(cc|cu|cuh|h)$/)
  t.true(native.length > 20)
  const below = native.filter(({ file }) => !file.startsWith('csrc/node/'))
  t.deepEqual(matching(below, /#include\s*[<"](napi|node_api|v8|Python\.h|torch|ATen|c10|pybind)/), [])
  // The check itself must be able to fail.
  t.not(matching(native, /#include\s*[<"]napi/).length, 0)
})

test('the addon sees the contract and itself', (t) => {
  const includes = sources('csrc/node', /\.(cc|h)$/).flatMap(({ text }) =>
    [...text.matchAll(/#include "([^"]+)"/g)].map((match) => match[1]!),
  )
  t.deepEqual([...new Set(includes)].filter((name) => !name.startsWith('node/')).sort(), ['epmoe.h'])
})

test('the addon neither links against Python nor includes its headers', (t) => {
  t.deepEqual(
    matching(sources('csrc', /(\.cc|\.h|CMakeLists\.txt)$/), /#include\s*<Python\.h>|python3?-embed|Python3_/),
    [],
  )
})

test('the library part does not import the command line', (t) => {
  const files = sources('src', /\.(ts|mjs)$/)
  t.deepEqual(
    matching(
      files.filter(({ file }) => !file.startsWith('src/cli/')),
      /from '[^']*\/cli\//,
    ),
    [],
  )
  t.not(matching(files, /from '\.\.\/verb\.js'/).length, 0)
})

test('what only the server needs is loaded by the server only', (t) => {
  const files = sources('src', /\.(ts|mjs)$/)
  const elsewhere = files.filter(({ file }) => !file.startsWith('src/serve/'))
  t.deepEqual(matching(elsewhere, /from '(fastify|prom-client)/), [])
  t.not(matching(files, /from '(fastify|prom-client)/).length, 0)
  // The command line loads it when it is asked to serve; model.ts is as light as the rest.
  t.deepEqual(matching(elsewhere, /serve\/(?!model\.js)\w+\.js'/), ['src/cli/verbs/serve.ts'])
  t.deepEqual(matching(elsewhere, /from '[^']*serve\/(?!model\.js)\w+\.js'/), [])
})

test('one module loads pymport', (t) => {
  t.deepEqual(matching(sources('src', /\.ts$/), /\('pymport'\)|from 'pymport'/), [
    'src/foreign.ts',
    'src/python/start.ts',
  ])
  // The other only asks whether somebody has loaded it.
  t.regex(readFileSync(join(root, 'src/foreign.ts'), 'utf8'), /require\.resolve\('pymport'\)/)
})

test('the environment is read in one place, and one more for the set-up', (t) => {
  t.deepEqual(matching(sources('src', /\.(ts|mjs)$/), /process\.env\['EPMOE_(?!LIBRARY)|read\('EPMOE_/), [
    'src/env.ts',
    'src/setup/settings.mjs',
  ])
})

test('the generated files are fresh', (t) => {
  const files = generated()
  t.is(files.size, 2)
  for (const [file, text] of files) t.is(readFileSync(join(root, file), 'utf8'), text, `${file}: run npm run generate`)
})

test('no file grows into a giant', (t) => {
  const all = [...sources('src', /\.(ts|mjs)$/), ...sources('csrc', /\.(cc|cu|cuh|h)$/), ...sources('python', /\.py$/)]
  t.deepEqual(
    all
      .filter(({ file, text }) => !/generated[./]/.test(file) && text.split('\n').length > 450)
      .map(({ file }) => file),
    [],
  )
})
