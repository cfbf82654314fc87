// The data path of a layer without its matrix products, as one: what a decoding step spends beside the GEMMs.
import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { devices, startPython } from 'epmoe'

const implementations = ['epmoe', 'epmoe:triton-numerics', 'triton', 'triton-original', 'torch']

export default function path(): void {
  const gpu = devices().find((device) => device !== 'cpu')
  // Interpreted Triton is no opponent.
  const names = gpu === undefined ? ['epmoe', 'torch'] : implementations
  const file = fileURLToPath(new URL('./path.py', import.meta.url))
  const bench = startPython().exec(readFileSync(file, 'utf8'), file)
  console.log(
    `preprocess, preReorder, siluAndMul and postReorder, bf16, H 7168, I 2048, K 8, E 256, on ${gpu ?? 'cpu'}; µs`,
  )
  for (const tokens of [1, 8, 64, 512, 4096]) {
    const times = bench.method('measure', gpu ?? 'cpu', tokens, names).toJS() as Record<string, string>
    const columns = Object.entries(times).map(([name, time]) => `${name} ${time}`)
    console.log(`T ${String(tokens).padStart(5)}  ${columns.join('  ')}`)
  }
}
