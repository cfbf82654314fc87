import { existsSync, readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { type PyRef, type startPython, stats } from 'epmoe'

/** Whose memory a process's RSS is, in MB, so that a slope can be laid at somebody's door. */
export interface Memory {
  /** The sum of the next five. */
  rss: number
  /** Pages of mapped files: code, mostly. */
  files: number
  /** What V8 keeps for the main thread's heap, of which heapUsed holds objects, dead ones included. */
  v8: number
  /** What malloc has handed out, to anybody in the process. */
  mallocUsed: number
  /** What malloc keeps of what was freed. Some of it may have gone back to the system; `rest` is lower by that. */
  mallocKept: number
  /** Python's small objects, stacks, code that V8 generated, workers. */
  rest: number

  heapUsed: number
  /** Memory outside V8's heap that its objects hold; ArrayBuffers among it. */
  external: number
  /** Blocks that Python's allocator for small objects has handed out, in thousands. */
  pythonBlocks: number
  /** Live PyRefs and Tensors of epmoe. */
  live: number
  threads: number
}

/** RSS and what it is the sum of. */
export const memoryParts = [
  'rss',
  'files',
  'v8',
  'mallocUsed',
  'mallocKept',
  'rest',
] as const satisfies readonly (keyof Memory)[]

export class MemoryMeter {
  readonly #python: PyRef

  constructor(python: ReturnType<typeof startPython>) {
    const file = fileURLToPath(new URL('./memory.py', import.meta.url))
    this.#python = python.exec(readFileSync(file, 'utf8'), 'bench/memory.py')
  }

  read(): Memory {
    const { rss, heapTotal, heapUsed, external } = process.memoryUsage()
    const { mallocUsed, mallocKept, pythonBlocks } = this.#figures()
    const [total, files, v8] = [rss / 1e6, (statusOf('RssFile') * 1024) / 1e6, heapTotal / 1e6]
    return {
      rss: total,
      files,
      v8,
      mallocUsed,
      mallocKept,
      rest: total - files - v8 - mallocUsed - mallocKept,
      heapUsed: heapUsed / 1e6,
      external: external / 1e6,
      pythonBlocks,
      live: liveObjects(),
      threads: statusOf('Threads'),
    }
  }

  /** Has malloc give back what it keeps. */
  trim(): void {
    this.#python.method('trim').dispose()
  }

  #figures(): Pick<Memory, 'mallocUsed' | 'mallocKept' | 'pythonBlocks'> {
    using figures = this.#python.method('figures')
    return figures.toJS() as Pick<Memory, 'mallocUsed' | 'mallocKept' | 'pythonBlocks'>
  }
}

/** Live PyRefs and Tensors. */
export function liveObjects(): number {
  const { cpu, cuda, python } = stats()
  return cpu.tensors + cuda.tensors + python.refs
}

/** A number of /proc/self/status, sizes in units of 1,024 bytes; 0 where there is none. */
function statusOf(field: string): number {
  const file = '/proc/self/status'
  if (!existsSync(file)) return 0
  return Number(new RegExp(`^${field}:\\s+(\\d+)`, 'm').exec(readFileSync(file, 'utf8'))?.[1] ?? 0)
}

/** Of the line of least squares. */
export function slopeOf(points: [x: number, y: number][]): number {
  const mean = (of: (point: [number, number]) => number) =>
    points.reduce((sum, each) => sum + of(each), 0) / points.length
  const [x, y] = [mean(([each]) => each), mean(([, each]) => each)]
  return mean((each) => (each[0] - x) * (each[1] - y)) / mean(([each]) => (each - x) ** 2)
}
