// npm run bench -- host | kernels | soak | serve: what a call costs on the host, what the kernels reach on the GPU, whether
// memory stays flat under hours of mixed calls, and how many tokens a second are served.
const suites: Record<string, () => Promise<{ default: () => void | Promise<void> }>> = {
  host: () => import('./host.js'),
  kernels: () => import('./kernels.js'),
  soak: () => import('./soak.js'),
  serve: () => import('./serve.js'),
}

const suite = suites[process.argv[2] ?? '']
if (suite === undefined) {
  console.error(`usage: npm run bench -- ${Object.keys(suites).join(' | ')}`)
  process.exitCode = 2
} else {
  await (await suite()).default()
}
