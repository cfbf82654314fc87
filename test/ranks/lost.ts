// One rank of a job in which one comes to harm: FATE of rank VICTIM in the middle of its calls.
// tsx test/ranks/lost.ts FATE VICTIM SCHEME BACKEND. What the others see is printed as a line of JSON.
import { EpmoeError, expertParallel, joinRanks, kw, startPython } from 'epmoe'

const [fate = '', victim = '', scheme = 'all-to-all', backend = 'gloo'] = process.argv.slice(2)
const python = startPython()
const torch = python.import('torch')
torch.method('set_num_threads', 1).dispose()
const group = joinRanks({ backend: backend as 'gloo', timeoutMs: 8000 })
const { device } = group
const dtype = torch.get('bfloat16')
const { start, end } = group.expertRange(5)
const layer = expertParallel({
  w13: torch.method('randn', end - start, 32, 16, kw({ dtype, device })),
  w2: torch.method('randn', end - start, 16, 16, kw({ dtype, device })),
  group,
  scheme: scheme as 'all-to-all',
})
const call = {
  hiddenStates: torch.method('randn', 8, 16, kw({ dtype, device })),
  topkIds: torch.method('randint', 0, 5, [8, 2], kw({ device })),
  topkWeights: torch.method('rand', 8, 2, kw({ device })),
}
for (let i = 0; i < 3; i++) layer.forward(call).dispose()
console.log(JSON.stringify({ rank: group.rank, pid: process.pid }))
if (group.rank === Number(victim)) {
  if (fate.startsWith('is killed')) process.kill(process.pid, 'SIGKILL')
  if (fate === 'freezes') process.kill(process.pid, 'SIGSTOP')
  if (fate === 'ends early') process.exit(0)
  if (fate === 'throws') throw new RangeError('nobody catches this')
  if (fate === 'does not come') await new Promise((resolve) => setTimeout(resolve, 14_000))
  // What the others wait for is not sent.
  if (fate === 'cannot agree') {
    const failing = python.eval('lambda *_: (_ for _ in ()).throw(MemoryError("no room for a head"))')
    python.import('epmoe.distributed').set('_head', failing)
    forward(layer)
  }
  // This rank counts a call that no other has made.
  if (fate === 'misses a call') {
    for (const step of ['enter', 'leave']) group.python.method(step).dispose()
    forward(layer)
  }
  if (fate === 'fails in the middle') {
    const failing = {
      activation: () => {
        throw new RangeError('experts on fire')
      },
    }
    // The others make this layer too, with an activation that works.
    forward(again(failing))
  }
} else if (fate === 'fails in the middle') forward(again({ activation: (rows) => rows.method('narrow', 1, 0, 16) }))
else forward(layer)

function again(options: Pick<Parameters<typeof expertParallel>[0], 'activation'>) {
  const weights = {
    w13: torch.method('randn', 2, 32, 16, kw({ dtype, device })),
    w2: torch.method('randn', 2, 16, 16, kw({ dtype, device })),
  }
  return expertParallel({ ...weights, ...options, group, scheme: scheme as 'all-to-all' })
}

function forward(failing: typeof layer): void {
  const begin = performance.now()
  for (let attempt = 0; attempt < 2; attempt++) {
    try {
      for (let i = 0; i < 100; i++) failing.forward(call).dispose()
    } catch (error) {
      const { code, message } = error instanceof EpmoeError ? error : { code: '', message: String(error) }
      const seconds = (performance.now() - begin) / 1000
      console.log(JSON.stringify({ rank: group.rank, attempt, code, message, seconds }))
      process.exitCode = 3
    }
  }
}
