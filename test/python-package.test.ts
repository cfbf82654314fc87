import { spawnSync } from 'node:child_process'
import { readdirSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import test from 'ava'
import { env } from '../src/env.js'
import { packageRoot } from '../src/package-root.js'
import { findPython } from '../src/setup/find-python.mjs'

const folder = fileURLToPath(new URL('./python/', import.meta.url))

const modules = readdirSync(folder)
  .filter((file) => /^test_.*\.py$/.test(file))
  .map((file) => file.replace('.py', ''))

for (const module of modules) {
  test(`python -m unittest ${module}`, (t) => {
    t.timeout(300_000)
    const found = findPython({ fromEnvironment: env.python, packageRoot })
    const { status, stderr } = spawnSync(found?.python ?? '', ['-m', 'unittest', module], {
      cwd: folder,
      encoding: 'utf8',
      env: { ...process.env, PYTHONPATH: fileURLToPath(new URL('../python', import.meta.url)) },
    })
    t.is(status, 0, stderr)
    t.regex(stderr, /Ran [1-9]\d* tests? in/)
  })
}
