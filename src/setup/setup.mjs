// Installs and builds whatever is missing, and nothing else.
import { installNodeModules, buildPymport } from './node-modules.mjs'
import { buildNative } from './native.mjs'
import { preparePython } from './python-env.mjs'
import { Missing, explain, step } from './step.mjs'
import { compileTypeScript } from './typescript.mjs'

try {
  const [major = 0, minor = 0] = process.versions.node.split('.').map(Number)
  if (major < 20 || (major === 20 && minor < 19)) {
    throw new Missing(`Node ${process.version} is too old`, 'install Node 20.19 or newer')
  }
  await step('npm packages', installNodeModules)
  await step('pymport', buildPymport)
  await step('native library and addon', buildNative)
  await step('Python environment', preparePython)
  await step('TypeScript', compileTypeScript)
} catch (error) {
  explain(error)
}
