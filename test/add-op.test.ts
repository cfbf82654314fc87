import { spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import test from 'ava'
import { ops } from 'epmoe'

const root = fileURLToPath(new URL('..', import.meta.url))
const fixtures = join(root, 'test/fixtures/ops')

function run(command: string, args: string[], env: Record<string, string> = {}): string {
  const result = spawnSync(command, args, { encoding: 'utf8', cwd: root, env: { ...process.env, ...env } })
  if (result.status !== 0) throw new Error(`${command} ${args.join(' ')}\n${result.stdout}${result.stderr}`)
  return result.stdout
}

test('a file dropped into a folder of ops is an op everywhere, and no list was edited', (t) => {
  t.timeout(300_000)
  const build = mkdtempSync(join(tmpdir(), 'epmoe-ops-'))
  try {
    // The very build of the package, with one more folder; without CUDA, which the op does not have.
    run('node', [
      join(root, 'node_modules/cmake-js/bin/cmake-js'),
      'compile',
      '--directory=csrc',
      `--out=${build}`,
      '--CDEPMOE_CUDA=off',
      `--CDEPMOE_EXTRA_OPS=${fixtures}`,
    ])
    const environment = { EPMOE_NATIVE: join(build, 'Release') }
    const tsx = (source: string) =>
      run('node', ['--conditions=epmoe-source', '--import=tsx', '--input-type=module', '--eval', source], environment)

    // The op table, and the TypeScript and Python that follow from it.
    const described = JSON.parse(
      tsx(`import { ops } from 'epmoe'
        import { generated } from ${JSON.stringify(join(root, 'src/generate/index.ts'))}
        console.log(JSON.stringify({ names: ops().map((op) => op.name), sources: [...generated().values()] }))`),
    ) as { names: string[]; sources: [string, string] }
    t.deepEqual(described.names, [...ops().map(({ name }) => name), 'scale_rows'].sort())
    t.regex(described.sources[0], /export function scaleRows<Output extends TensorLike>\(args: ScaleRowsArguments/)
    t.regex(described.sources[0], /rowFactor: TensorLike/)
    t.regex(described.sources[1], /def scale_rows\(\n {4}input,\n {4}row_factor,\n {4}output,\n {4}times=1,/)

    // A call, and a mistake that the generic checker finds by the op's own descriptor.
    const answers = JSON.parse(
      tsx(`import { Tensor } from 'epmoe'
        import { Op } from ${JSON.stringify(join(root, 'src/call.ts'))}
        const op = new Op('scale_rows')
        const call = (input, rowFactor, output) => {
          op.call({ input, rowFactor, output, times: 3 })
          return [...output.data]
        }
        const rows = Tensor.from(new Float32Array([1, 2, 3, 4]), [2, 2])
        const result = call(rows, Tensor.from(new Float32Array([10, 100])), Tensor.zeros([2, 2]))
        let mistake
        try { call(rows, Tensor.zeros([3]), Tensor.zeros([2, 2])) } catch ({ code, op, argument, expected }) { mistake = { code, op, argument, expected } }
        console.log(JSON.stringify({ result, mistake }))`),
    ) as { result: number[]; mistake: Record<string, string> }
    t.deepEqual(answers.result, [30, 60, 900, 1200])
    t.is(answers.mistake['code'], 'ERR_SHAPE')
    t.is(answers.mistake['op'], 'scaleRows')
    t.is(answers.mistake['argument'], 'rowFactor')
    t.regex(answers.mistake['expected'] ?? '', /T = 2 \(from input\)/)
  } finally {
    rmSync(build, { recursive: true, force: true })
  }
  // Nothing in the sources knows of it.
  t.notRegex(readFileSync(join(root, 'csrc/CMakeLists.txt'), 'utf8'), /scale_rows|post_reorder/)
})
