// npm run bench -- host | kernels | ranks | migrate | soak: what a call costs on the host, what the kernels reach on the
// GPU, what more ranks give, what shadow costs, and whether memory stays flat under hours of mixed calls.
const suites: Record<string, () => Promise<{ default: () => void | Promise<void> }>> = {
  host: () => import('./host.js'),
  kernels: () => import('./kernels.js'),
  ranks: () => import('./ranks.js'),
  migrate: () => import('./migrate.js'),
  soak: () => import('./soak.js'),
}

const suite = suites[process.argv[2] ?? '']
if (suite === undefined) {
  console.error(`usage: npm run bench -- ${Object.keys(suites).join(' | ')}`)
  process.exitCode = 2
} else {
  await (await suite()).default()
}
