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
  cudaProblem: device.cudaProblem(),
  withoutPeerAccess: pairs(devices().length - 1).filter(([a, b]) => !device.peerAccess(a, b)),
}
console.log(marker + JSON.stringify(facts))

function pairs(count: number): [number, number][] {
  const all = Array.from({ length: count }, (_, i) => i)
  return all.flatMap((a) => all.filter((b) => b !== a).map((b): [number, number] => [a, b]))
}
