import { readdirSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { EpmoeError } from '../errors.js'

/** The capsules that paths name: files as they are, of folders every `*.safetensors`. Throws ERR_USAGE for none. */
export function capsuleFiles(paths: readonly string[]): string[] {
  const files = paths.flatMap((path) => {
    if (!statSync(path, { throwIfNoEntry: false })?.isDirectory()) return [path]
    return readdirSync(path)
      .filter((name) => name.endsWith('.safetensors') && !name.startsWith('.'))
      .sort()
      .map((name) => join(path, name))
  })
  if (files.length > 0) return files
  throw new EpmoeError({
    code: 'ERR_USAGE',
    argument: 'FILE',
    expected: 'capsules, or folders that hold some',
    received: `no *.safetensors in ${paths.join(', ')}`,
  })
}
