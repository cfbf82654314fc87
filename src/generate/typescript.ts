import { camelCase, camelCaseWords } from '../errors.js'
import type { OpInfo, OpParam } from '../native.js'
import { sentence, wrap } from './text.js'

/** src/generated/ops.ts: one typed function an op. */
export function typescriptOf(ops: OpInfo[]): string {
  return [
    "// Generated from the library's descriptors by `npm run generate`; a test proves it fresh.",
    '/* biome-ignore-all format: generated */',
    "import { Op, type PreparedCall, type TensorLike } from '../call.js'",
    "import type { Stream } from '../stream.js'",
    '',
    ...ops.map(opSource),
  ].join('\n')
}

function opSource(op: OpInfo): string {
  const name = camelCase(op.name)
  const type = `${name[0]?.toUpperCase()}${name.slice(1)}Arguments`
  const variable = `${name}Op`
  const putter = `put${type.replace(/Arguments$/, '')}`
  const output = op.params.find((param) => param.role === 'out')
  const returned = output === undefined ? 'void' : 'Output'
  const generic = output === undefined ? '' : '<Output extends TensorLike>'
  const argumentType = output === undefined ? type : `${type} & { ${camelCase(output.name)}: Output }`
  return [
    `/** Arguments of ${name}. Tensors are contiguous and on one device; axes of one name have one length. */`,
    `export interface ${type} {`,
    ...op.params.flatMap((param) => [
      ...comment(`${sentence(param.doc)} ${facts(param)}`, '  '),
      `  ${camelCase(param.name)}${param.optional ? '?' : ''}: ${typeOf(param)}`,
    ]),
    "  /** Where to run. Default: torch's current stream when a tensor is torch's, otherwise epmoe's own. CUDA only. */",
    '  stream?: Stream | undefined',
    '}',
    '',
    `let ${variable}: Op | undefined`,
    '',
    ...comment(
      `${sentence(op.doc)} Throws EpmoeError; an index out of range inside a tensor is skipped and reported, on the CPU by the call itself and on CUDA by the next synchronize().${output === undefined ? '' : ` Returns ${camelCase(output.name)}.`}`,
      '',
    ),
    `export function ${name}${generic}(args: ${argumentType}): ${returned} {`,
    `  const op = (${variable} ??= new Op('${op.name}'))`,
    '  op.begin(args)',
    `  ${putter}(op, args)`,
    '  op.run(args, args.stream)',
    ...(output === undefined ? [] : [`  return args.${camelCase(output.name)}`]),
    '}',
    '',
    `function ${putter}(op: Op, args: ${type}): void {`,
    ...op.params.map((param, slot) => `  ${put(param, slot)}`),
    '}',
    '',
    '/** Checks the arguments once, for a call that is made many times. */',
    `${name}.prepare = (args: ${type}): PreparedCall => {`,
    `  const op = (${variable} ??= new Op('${op.name}'))`,
    '  op.beginPrepared(args)',
    `  ${putter}(op, args)`,
    '  return op.prepare(args, args.stream)',
    '}',
    '',
  ].join('\n')
}

function typeOf(param: OpParam): string {
  const optional = param.optional ? ' | undefined' : ''
  if (param.kind === 'tensor') return `TensorLike${optional}`
  if (param.kind === 'enum') return `${(param.choices ?? []).map((choice) => `'${choice}'`).join(' | ')}${optional}`
  return `${param.kind === 'int' ? 'number | bigint' : 'number'}${optional}`
}

/** Shape and dtype of a tensor, default of a scalar. */
function facts(param: OpParam): string {
  if (param.kind !== 'tensor') {
    const value = param.kind === 'enum' ? `'${param.choices?.[param.default ?? 0]}'` : String(param.default)
    return `Default ${value}.`
  }
  const shapes = (param.shape ?? '').split('|').map((shape) => `[${shape.split(',').join(', ')}]`)
  const like = param.dtypeLike === undefined ? [] : [`that of ${camelCase(param.dtypeLike)}`]
  return `Shape ${shapes.join(' or ')}; dtype ${[...(param.dtypes ?? []), ...like].join(', ')}.`
}

function put(param: OpParam, slot: number): string {
  const name = camelCase(param.name)
  const call = { tensor: 'tensor', int: 'integer', float: 'real', enum: 'choice' }[param.kind]
  const choices = param.kind === 'enum' ? `, [${(param.choices ?? []).map((choice) => `'${choice}'`).join(', ')}]` : ''
  return `op.${call}(${slot}, '${name}', args.${name}${choices})`
}

function comment(text: string, indent: string): string[] {
  const lines = wrap(camelCaseWords(text), 114 - indent.length)
  if (lines.length === 1) return [`${indent}/** ${lines[0]} */`]
  return [`${indent}/**`, ...lines.map((line) => `${indent} * ${line}`), `${indent} */`]
}
