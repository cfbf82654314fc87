// Run in a process of its own: loads the addon and tells what it finds.
import { deviceFacts, devices } from '../device.js'
import { native } from '../native.js'
import { ops } from '../ops.js'
import type { NativeFacts } from './native.js'
import { marker } from './outcome.js'

const { version, device } = native()
const facts: NativeFacts = {
  version,
  ops: ops().map(({ name }) => name),
  cudaCompiled: device.cudaCompiled,
  gpus: devices()
    .filter((name) => name !== 'cpu')
    .map((name) => deviceFacts(name)),
}
console.log(marker + JSON.stringify(facts))
