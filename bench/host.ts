// What one call costs on the host, launch included, in one process.
import { spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { devices, Graph, type PyRef, postReorder, Stream, startPython, Tensor } from 'epmoe'

const calls = 900 // fewer than a stream queues before the host has to wait
const rounds = 101

export default function host(): void {
  const python = startPython()
  const gpu = devices().find((device) => device !== 'cpu')
  const bench = python.exec(readFileSync(fileURLToPath(new URL('./host.py', import.meta.url)), 'utf8'), 'bench/host.py')
  const names = ['down_output', 'output', 'src2dst', 'topk_ids', 'topk_weights']
  const made = bench.method('arguments', gpu ?? 'cpu')
  const [downOutput, output, src2dst, topkIds, topkWeights] = names.map((name) => made.item(name)) as [
    PyRef,
    PyRef,
    PyRef,
    PyRef,
    PyRef,
  ]
  const asTorch = { downOutput, output, src2dst, topkIds, topkWeights }
  const [t0, t1, t2, t3, t4] = Object.values(asTorch).map((ref) => Tensor.fromTorch(ref)) as [
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
  ]
  const asTensors = { downOutput: t0, output: t1, src2dst: t2, topkIds: t3, topkWeights: t4 }
  const drain = () => bench.method('drain').dispose()

  const rows: [string, number][] = []
  const bare = gpu === undefined ? undefined : bareLaunch()
  if (bare !== undefined) {
    for (const [label, early] of [
      ['bare launch of an empty kernel, C++', 0],
      ['the same, allowed to start early, C++', 1],
    ] as const) {
      rows.push([label, bench.method('bare_launch', bare, calls, rounds, early).toJS() as number])
    }
  }
  const idle = {
    ...asTensors,
    output: t1.view([0, 512]),
    src2dst: t2.view([0]),
    topkIds: t3.view([0, 8]),
    topkWeights: t4.view([0, 8]),
  }
  rows.push(['postReorder, checks only (T = 0), Node', median(() => postReorder(idle), drain)])
  rows.push(['postReorder, five Tensors, Node', median(() => postReorder(asTensors), drain)])
  rows.push(['postReorder, five torch tensors, Node', median(() => postReorder(asTorch), drain)])
  using preparedIdle = postReorder.prepare(idle)
  rows.push(['postReorder, prepared, nothing to launch (T = 0)', median(() => preparedIdle.run(), drain)])
  using prepared = postReorder.prepare(asTensors)
  rows.push(['postReorder, prepared, Node', median(() => prepared.run(), drain)])
  if (gpu !== undefined) {
    using stream = Stream.create(gpu)
    using empty = Graph.capture(stream, () => {})
    using graph = Graph.capture(stream, () => prepared.run())
    const current = Stream.torchCurrent(gpu)
    rows.push(['replay of an empty graph, Node', median(() => empty.replay(), drain)])
    rows.push(['replay of postReorder, Node', median(() => graph.replay(current), drain)])
    rows.push(['the same beside torch, Node', median(() => graph.replay(), drain)])
  }
  for (const [label, time] of Object.entries(
    bench.method('python_calls', made, calls, rounds).toJS() as Record<string, number>,
  )) {
    rows.push([label, time])
  }
  console.log(
    `µs a call, median of ${rounds} rounds of ${calls} calls, on ${gpu ?? 'cpu (no launch: the op itself runs)'}`,
  )
  for (const [label, time] of rows) console.log(`${label.padEnd(48)} ${time.toFixed(2).padStart(8)}`)
}

function median(call: () => void, drain: () => void): number {
  const times: number[] = []
  for (let round = -10; round < rounds; round++) {
    const begin = performance.now()
    for (let i = 0; i < calls; i++) call()
    const time = ((performance.now() - begin) / calls) * 1e3
    drain()
    if (round >= 0) times.push(time)
  }
  return times.sort((a, b) => a - b)[rounds >> 1]!
}

/** A library that launches an empty kernel with as many arguments, or undefined without nvcc. */
function bareLaunch(): string | undefined {
  const library = join(mkdtempSync(join(tmpdir(), 'epmoe-bench-')), 'bare.so')
  const source = fileURLToPath(new URL('./bare_launch.cu', import.meta.url))
  const result = spawnSync('nvcc', ['-O3', '-arch=native', '-shared', '-Xcompiler', '-fPIC', '-o', library, source])
  return result.status === 0 ? library : undefined
}
