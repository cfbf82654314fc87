import { copyFileSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import test from 'ava'
import { EpmoeError } from 'epmoe'
import { Capsule } from '../src/migrate/capsule.js'
import { type ReplayReport, replay } from '../src/migrate/replay.js'
import { availableBackends } from '../src/parity/backends.js'
import { emptyFolder, epmoe, plainPython } from './helpers/migration.js'
import { python } from './helpers/python.js'

/** A folder with a capsule of each kernel; and their files by what their names hold. */
async function recorded(t: { teardown(clean: () => void): void }) {
  const folder = emptyFolder(t)
  const { status, stderr } = await plainPython(['recorded_calls.py', folder])
  if (status !== 0) throw new Error(stderr)
  const files = readdirSync(folder).sort()
  return { folder, of: (kernel: string) => join(folder, files.find((name) => name.includes(kernel))!) }
}

/** Changes capsules by Python code on `held`, a Capsule, and writes them with digests that are right. */
async function change(changes: [file: string, code: string][]): Promise<void> {
  const program = `
import json, sys, torch
from epmoe.migrate import capsule
for file, code in json.loads(sys.argv[1]):
    held = capsule.load(file)
    exec(code)
    capsule.save(file, held)
`
  const { status, stderr } = await plainPython(['-c', program, JSON.stringify(changes)])
  if (status !== 0) throw new Error(stderr)
}

/** SGLang's kernels with a fault: one element of the rows of token 3. */
const faulty = `
import sys, serving_stack as s
source = s.HEADER + s.POST_REORDER.format(**s.GENERATIONS["a"])
bad = source.replace("tl.store(output_ptr + token", "total = tl.where((token == 3) & (at == 41), total + 1, total)\\n        tl.store(output_ptr + token", 1)
assert bad != source
open(sys.argv[1], "w").write(bad + s.REST.replace("{flag}", "").replace("{index}", "expert - start_expert_id"))
`

test('every op that is recorded is replayed, and what Triton made is one more reference', async (t) => {
  const { folder } = await recorded(t)
  const json = join(folder, 'report.json')
  const junit = join(folder, 'report.xml')
  const done = await epmoe(['replay', folder, '--json', json, '--junit', junit, '--quiet'])
  t.is(done.status, 0, done.stdout + done.stderr)
  const report = JSON.parse(readFileSync(json, 'utf8')) as ReplayReport
  t.is(report.schema, 'epmoe.parity/1')
  t.is(report.capsules.length, 10)
  t.true(report.capsules.every(({ passed }) => passed))
  const ops = ['ep_gather', 'ep_scatter', 'post_reorder', 'pre_reorder', 'preprocess', 'silu_and_mul']
  t.deepEqual([...new Set(report.capsules.map(({ op }) => op))].sort(), ops)
  for (const { name } of report.capsules) {
    const references = new Set(report.cases.filter((each) => each.name === name).map(({ reference }) => reference))
    for (const reference of ['float64', 'torch', 'triton', 'recorded'])
      t.true(references.has(reference), `${name} ${reference}`)
  }
  t.true(report.controls.length > 50 && report.controls.every(({ detected }) => detected))
  t.regex(readFileSync(junit, 'utf8'), /<testsuite name="epmoe parity" tests="\d+" failures="0"/)
})

test('a recorded result that is wrong is found, and whose fault it is', async (t) => {
  const { of } = await recorded(t)
  const wrong: [string, string][] = [
    ['post_reorder', 'held.tensors["triton"]["output"][2, 5] += 1'],
    ['pre_reorder', 'held.tensors["triton"]["gateup_input"][:, 3] += 1'],
    ['silu_and_mul_triton', 'held.tensors["triton"]["down_input"][:, 0] += 1'],
    ['run_moe', 'held.tensors["triton"]["src2dst"][4] += 1'],
    ['ep_scatter', 'held.tensors["triton"]["m_indices"][0] = 3'],
    ['ep_gather', 'held.tensors["triton"]["output_tensor"][:] = 0'],
    ['masked_post_quant', 'held.tensors["triton"]["output_scales"][0, 0, 0] *= 2'],
  ]
  await change(wrong.map(([kernel, code]) => [of(kernel), code]))
  const files = wrong.map(([kernel]) => of(kernel))
  const done = await epmoe(['replay', ...files, '--reference', 'float64,recorded', '--quiet'])
  t.is(done.status, 1, done.stdout + done.stderr)
  const told = done.stdout.match(/epmoe is within its bounds of the float64 oracle, so recorded differs/g)
  // ep_gather's sums are judged by their error, in which a row of zeros for a reference is no better.
  t.true((told?.length ?? 0) >= wrong.length - 1, done.stdout)
})

test('a call that fails is shrunk to the smallest that does', async (t) => {
  const { folder, of } = await recorded(t)
  const kernels = join(folder, 'kernels.py')
  t.is((await plainPython(['-c', faulty, kernels])).status, 0)
  const file = join(folder, 'failing.safetensors')
  copyFileSync(of('post_reorder'), file)
  const only = ['--backend', 'cpu:triton-numerics', '--reference', 'float64,triton-original', '--quiet']
  const sound = await epmoe(['replay', file, '--shrink', '--reference', 'float64,triton', '--quiet'])
  t.is(sound.status, 0, sound.stdout)
  t.notRegex(sound.stdout, /-small/)
  const done = await epmoe(['replay', file, '--shrink', ...only], { EPMOE_SGLANG: kernels })
  t.is(done.status, 1, done.stdout + done.stderr)
  t.regex(done.stdout, /so triton-original differs/)
  // Token 3 is the fourth, and column 41 the forty-second; a slot and an expert are enough.
  t.regex(done.stdout, /failing-small\.safetensors: tokens 5 to 4, experts 2 to 1, topk 2 to 1, hidden 70 to 42/)
  const small = join(folder, 'failing-small.safetensors')
  t.is((await epmoe(['replay', small, ...only], { EPMOE_SGLANG: kernels })).status, 1)
  t.is((await epmoe(['replay', small, '--reference', 'float64,torch,triton', '--quiet'])).status, 0)
})

test('files that are cut short, changed or made up are refused with code 2, and nothing is run', async (t) => {
  const { folder, of } = await recorded(t)
  const good = readFileSync(of('post_reorder'))
  const written = (name: string, content: Buffer) => {
    writeFileSync(join(folder, name), content)
    return join(folder, name)
  }
  const flipped = Buffer.from(good)
  flipped[good.length - 3]! ^= 1
  const cases: [string, RegExp][] = [
    [written('cut.safetensors', good.subarray(0, 300)), /It is cut short/],
    [written('empty.safetensors', Buffer.alloc(0)), /It is cut short/],
    [written('flipped.safetensors', flipped), /The file was damaged or changed/],
    [written('text.safetensors', Buffer.from('not a capsule at all')), /expected/],
    [join(folder, 'absent.safetensors'), /FileNotFoundError/],
  ]
  // The digest is right in these: whoever made them up knew how.
  const made: [string, string, RegExp][] = [
    ['index', 'held.tensors["argument"]["src2dst"][:] = 2**30', /out of range|1073741824/],
    ['shape', 'held.tensors["argument"]["topk_ids"] = torch.zeros(1, 1, dtype=torch.int32)', /shape|expected/i],
    ['op', 'held.op = "../../etc/passwd"', /expected an op of/],
    ['scalar', 'held.scalars["dst_start"] = [1]', /expected a number or word for dst_start/],
    ['surplus', 'held.scalars["surplus"] = 1', /surplus/],
    ['argument', 'held.tensors["argument"]["os_system"] = torch.zeros(1)', /os_system/],
    [
      'dtype',
      'held.tensors["argument"]["down_output"] = held.tensors["argument"]["down_output"].to(torch.complex64)',
      /complex64|dtype/,
    ],
    ['nothing', 'held.tensors = {}', /expected/],
    ['results', 'held.tensors["triton"]["output"] = torch.zeros(9)', /expected/],
  ]
  for (const [name, , said] of made) {
    const file = join(folder, `${name}-made.safetensors`)
    copyFileSync(of('post_reorder'), file)
    cases.push([file, said])
  }
  await change(made.map(([name, code]) => [join(folder, `${name}-made.safetensors`), code]))
  const options = { backends: availableBackends(['cpu']), references: ['float64'], interpreterBudget: 0 }
  for (const [file, said] of cases) {
    const refusal = await t.throwsAsync(
      async () => {
        using capsule = Capsule.read(python, file)
        await replay({ ...options, capsules: [capsule], python, controls: 'off' })
      },
      { instanceOf: EpmoeError, message: said },
    )
    t.is(refusal?.code, 'ERR_CAPSULE')
    t.is(refusal?.argument, file)
  }
  for (const [file, said] of [cases[0]!, cases[5]!]) {
    const { status, stdout, stderr } = await epmoe(['replay', of('post_reorder'), file, '--quiet'])
    t.is(status, 2, `${file}: ${stdout}${stderr}`)
    t.is(stdout, '')
    t.regex(stderr, said)
    t.true(stderr.startsWith('epmoe: ') && stderr.includes(file), stderr)
    t.is(stderr.trim().split('\n').length, 1, stderr)
  }
  const none = await epmoe(['replay', '--config', join(folder, 'absent.json')])
  t.is(none.status, 2)
  t.regex(none.stderr, /absent\.json: expected a file of JSON/)
})
