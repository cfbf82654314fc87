// npm run bench -- host | path | ranks | serve | migrate | soak: what a call costs on the host, what a layer's data path
// costs, what more ranks give, how many tokens a second are served, what shadow costs, and whether memory stays flat under
// hours of mixed calls.
const suites: Record<string, () => Promise<{ default: () => void | Promise<void> }>> = {
  host: () => import('./host.js'),
  path: () => import('./path.js'),
  ranks: () => import('./ranks.js'),
  serve: () => import('./serve.js'),
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
