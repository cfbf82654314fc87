import { spawnSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import test from 'ava'
import { env } from '../src/env.js'
import { packageRoot } from '../src/package-root.js'
import { findPython } from '../src/setup/find-python.mjs'

const folder = fileURLToPath(new URL('./python/', import.meta.url))

for (const module of ['test_interpreter', 'test_references', 'test_front_end']) {
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
