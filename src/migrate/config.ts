import { resolve } from 'node:path'
import { env } from '../env.js'
import { EpmoeError, PythonError } from '../errors.js'
import { startPython } from '../python/start.js'

/** epmoe.migrate.json, checked; Python's spelling. */
export interface MigrateConfig {
  path: string
  modes: Record<string, string>
  settings: Record<string, Record<string, unknown>>
  record: ({ folder: string } & Record<string, unknown>) | null
}

/** The file that is meant: the one named, EPMOE_MIGRATE's, or the folder's own. */
export function configPath(named?: string): string {
  return resolve(named ?? env.migrate ?? 'epmoe.migrate.json')
}

/** What the file says. Throws ERR_CONFIG, which names the key that is wrong. */
export function readConfig(named?: string): MigrateConfig {
  return asked('read', configPath(named))
}

/** Writes modes by kernel to the file, which is made where there is none; without any, says what it holds. */
export function setModes(modes: Record<string, string>, named?: string): MigrateConfig {
  if (Object.keys(modes).length === 0) return readConfig(named)
  return asked('set_modes', configPath(named), modes)
}

function asked(name: string, ...args: unknown[]): MigrateConfig {
  using module = startPython().import('epmoe.migrate.config')
  try {
    using config = module.method(name, ...args)
    using plain = config.method('plain')
    return plain.toJS() as MigrateConfig
  } catch (cause) {
    if (!(cause instanceof PythonError) || cause.pythonType !== 'EpmoeError') throw cause
    throw new EpmoeError({ code: 'ERR_CONFIG', received: cause.pythonMessage }, { cause })
  }
}
