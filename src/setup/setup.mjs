// Installs and builds whatever is missing, and nothing else. Arguments are a program for node to run afterwards, with
// the environment that was prepared: node src/setup/setup.mjs src/cli/bin.mjs parity
// With --tests first, what only the tests need is there too.
import { spawn } from 'node:child_process'
import { buildNative } from './native.mjs'
import { installNodeModules } from './node-modules.mjs'
import { buildPymport } from './pymport.mjs'
import { preparePython, prepareTests } from './python-env.mjs'
import { explain, Missing, root, step } from './step.mjs'
import { compileTypeScript } from './typescript.mjs'

const tests = process.argv[2] === '--tests'

try {
  const [major = 0, minor = 0] = process.versions.node.split('.').map(Number)
  if (major < 20 || (major === 20 && minor < 19)) {
    throw new Missing(`Node ${process.version} is too old`, 'install Node 20.19 or newer')
  }
  await step('npm packages', installNodeModules)
  await step('pymport', buildPymport)
  await step('native library and addon', buildNative)
  const { python } = await step('Python environment', preparePython)
  if (tests) await step('packages for tests', prepareTests)
  await step('TypeScript', compileTypeScript)
  const program = process.argv.slice(tests ? 3 : 2)
  if (program.length > 0) {
    const child = spawn(process.execPath, program, {
      cwd: root,
      env: { ...process.env, EPMOE_PYTHON: python },
      stdio: 'inherit',
    })
    for (const signal of /** @type {const} */ (['SIGINT', 'SIGTERM'])) process.on(signal, () => child.kill(signal))
    child.on('exit', (code) => {
      process.exitCode = code ?? 1
    })
  }
} catch (error) {
  explain(error)
}
