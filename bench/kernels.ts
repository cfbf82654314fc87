// GPU times of post_reorder beside Triton and eager torch: CUDA graph replays with L2 warm, and calls with L2 flushed.
import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { devices, startPython } from 'epmoe'

export default function kernels(): void {
  if (devices().length === 1) {
    console.error('no GPU here: the kernel bench has nothing to time')
    process.exitCode = 3
    return
  }
  const file = fileURLToPath(new URL('./kernels.py', import.meta.url))
  const bench = startPython().exec(readFileSync(file, 'utf8'), file)
  bench.method('main').dispose()
}
