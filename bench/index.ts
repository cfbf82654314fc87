// npm run bench -- host | kernels: what a call costs on the host, and what the kernels reach on the GPU.
const suites: Record<string, () => Promise<{ default: () => void }>> = {
  host: () => import('./host.js'),
  kernels: () => import('./kernels.js'),
}

const suite = suites[process.argv[2] ?? '']
if (suite === undefined) {
  console.error(`usage: npm run bench -- ${Object.keys(suites).join(' | ')}`)
  process.exitCode = 2
} else {
  ;(await suite()).default()
}
