import { type ChildProcess, spawn } from 'node:child_process'
import { createServer } from 'node:net'
import { fileURLToPath } from 'node:url'
import { startPython } from 'epmoe'

export interface Ending {
  code: number | null
  signal: NodeJS.Signals | null
  output: string
  seconds: number
}

const root = fileURLToPath(new URL('../..', import.meta.url))
const node = [process.execPath, '--conditions=epmoe-source', '--import=tsx']
const { executable } = startPython()

/** A job as torchrun starts it: so many ranks on this machine. */
export function torchrun(ranks: number, program: string[]): Promise<Ending> {
  const launcher = ['-m', 'torch.distributed.run', '--no-python', '--standalone', '--nproc-per-node', String(ranks)]
  return endingOf(start(executable, [...launcher, ...node, ...program]))
}

/** The same ranks as if each were on a machine of its own, where nobody ends the others when one dies. */
export async function onTheirOwn(
  ranks: number,
  program: string[],
): Promise<{ children: ChildProcess[]; endings: Promise<Ending>[] }> {
  const port = await freePort()
  const children = Array.from({ length: ranks }, (_, rank) =>
    start(node[0]!, [...node.slice(1), ...program], {
      RANK: String(rank),
      LOCAL_RANK: String(rank), // of GPUs
      WORLD_SIZE: String(ranks),
      MASTER_ADDR: '127.0.0.1',
      MASTER_PORT: String(port),
    }),
  )
  return { children, endings: children.map(endingOf) }
}

function start(command: string, args: string[], environment: Record<string, string> = {}): ChildProcess {
  const env = { ...process.env, OMP_NUM_THREADS: '1', EPMOE_PYTHON: executable, ...environment }
  return spawn(command, args, { cwd: root, stdio: ['ignore', 'pipe', 'pipe'], env })
}

function endingOf(child: ChildProcess): Promise<Ending> {
  const begin = performance.now()
  let output = ''
  for (const stream of [child.stdout!, child.stderr!]) stream.on('data', (data) => (output += data))
  return new Promise((resolve) => {
    child.on('close', (code, signal) => resolve({ code, signal, output, seconds: (performance.now() - begin) / 1000 }))
  })
}

function freePort(): Promise<number> {
  return new Promise((resolve) => {
    const server = createServer().listen(0, '127.0.0.1', () => {
      const { port } = server.address() as { port: number }
      server.close(() => resolve(port))
    })
  })
}
