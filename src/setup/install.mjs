// npm's install script: builds the addon where epmoe is installed as a dependency.
import { buildNative } from './native.mjs'
import { explain, step } from './step.mjs'

try {
  await step('epmoe: native library and addon', buildNative)
} catch (error) {
  explain(error)
}
