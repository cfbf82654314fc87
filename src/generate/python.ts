import type { OpInfo, OpParam } from '../native.js'
import { sentence, wrap } from './text.js'

/** python/epmoe/generated.py: one documented function an op. */
export function pythonOf(ops: OpInfo[]): string {
  return [
    '"""Generated from the library\'s descriptors by `npm run generate`; a test proves it fresh."""',
    '',
    'from epmoe._call import invoke',
    '',
    '__all__ = [',
    ...ops.map((op) => `    "${op.name}",`),
    ']',
    '',
    ...ops.map(opSource),
  ].join('\n')
}

function opSource(op: OpInfo): string {
  const required = op.params.filter((param) => !param.optional)
  const optional = op.params.filter((param) => param.optional)
  const output = op.params.find((param) => param.role === 'out')
  return [
    '',
    `def ${op.name}(`,
    ...required.map((param) => `    ${param.name},`),
    ...optional.map((param) => `    ${param.name}=${defaultOf(param)},`),
    '    stream=None,',
    '):',
    ...docstring(op, output),
    '    invoke(',
    `        "${op.name}",`,
    '        (',
    ...op.params.map((param) => `            ${param.name},`),
    '        ),',
    '        stream,',
    '    )',
    ...(output === undefined ? [] : [`    return ${output.name}`]),
    '',
  ].join('\n')
}

function docstring(op: OpInfo, output: OpParam | undefined): string[] {
  const lines = [
    ...wrap(`    """${sentence(op.doc)}`, 112).map(indented),
    '',
    '    Args:',
    ...op.params.flatMap((param) =>
      wrap(`${param.name}: ${sentence(param.doc)} ${facts(param)}`.trimEnd(), 104).map(
        (line, i) => `${' '.repeat(i === 0 ? 8 : 12)}${line}`,
      ),
    ),
    ...wrap("stream: a torch.cuda.Stream or a cudaStream_t; torch's current stream when None. CUDA only.", 104).map(
      (line) => `        ${line}`,
    ),
    '',
    ...(output === undefined ? [] : ['    Returns:', `        ${output.name}`, '']),
    '    Raises:',
    '        EpmoeError: an argument does not fit. An index out of range inside a tensor is skipped and reported: on the',
    '            CPU by this call, on CUDA by the next epmoe.synchronize() or epmoe.check().',
    '    """',
  ]
  return lines
}

function indented(line: string, i: number): string {
  return i === 0 ? line : `    ${line}`
}

function defaultOf(param: OpParam): string {
  if (param.kind === 'tensor') return 'None'
  if (param.kind === 'enum') return `"${param.choices?.[param.default ?? 0]}"`
  if (param.kind === 'float') return Number.isInteger(param.default) ? `${param.default}.0` : String(param.default)
  return String(param.default)
}

function facts(param: OpParam): string {
  if (param.kind !== 'tensor') return ''
  const shapes = (param.shape ?? '').split('|').map((shape) => `[${shape.split(',').join(', ')}]`)
  const like = param.dtypeLike === undefined ? [] : [`that of ${param.dtypeLike}`]
  return `Shape ${shapes.join(' or ')}; dtype ${[...(param.dtypes ?? []), ...like].join(', ')}.`
}
