// Builds pymport's native part against the libpython of the interpreter that will be used.
import { existsSync, readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { minor, pythonVersion } from './find-python.mjs'
import { settings } from './settings.mjs'
import { inRoot, install, Missing, probe, run } from './step.mjs'

const command = 'npm rebuild pymport --build-from-source --foreground-scripts'

/** @returns {Promise<{ remark: string }>} */
export async function buildPymport() {
  const wanted = settings.python && pythonVersion(settings.python)
  if (settings.python && !wanted) {
    throw new Missing(`EPMOE_PYTHON=${settings.python} does not run`, 'name an interpreter that does, or unset it')
  }
  const built = embeddedPython()
  const version = wanted ? minor(wanted) : pkgConfigVersion()
  if (built !== undefined && (version === undefined || version === built))
    return { remark: `unchanged, libpython ${built}` }

  const env = settings.python ? environmentOf(settings.python) : process.env
  requireEmbedding(env, wanted ? minor(wanted) : undefined)
  await run('npm', command.split(' ').slice(1), { env, remedy: `${headers(version)}, then ${command}` })
  const binding = bindingFile()
  if (binding === undefined || embeddedPython() === undefined) throw new Missing('pymport was not built', command)
  const loads = probe(process.execPath, ['-e', `require(${JSON.stringify(binding)})`])
  if (loads === undefined) {
    throw new Missing(
      `pymport was built, but its libpython ${embeddedPython()} is not found at run time`,
      "put libpython's folder on LD_LIBRARY_PATH, or use the system's Python",
    )
  }
  return { remark: `built with libpython ${embeddedPython()}` }
}

/** The version of the libpython that pymport's binding links: `3.11`; undefined when there is no binding. */
export function embeddedPython() {
  const file = bindingFile()
  if (file === undefined) return undefined
  const text = readFileSync(file, 'latin1')
  const match = /libpython(3\.\d+)\w*\.(?:so|dylib)|Python\.framework\/Versions\/(3\.\d+)/.exec(text)
  return match?.[1] ?? match?.[2]
}

/** pymport's native part, wherever npm has put the package. */
export function bindingFile() {
  try {
    const entry = createRequire(inRoot('package.json')).resolve('pymport')
    const file = join(dirname(entry), 'binding', `${process.platform}-${process.arch}`, 'pymport.node')
    return existsSync(file) ? file : undefined
  } catch {
    return undefined
  }
}

/** The version of the libpython that pkg-config knows: `3.11`. @param {NodeJS.ProcessEnv} [env] */
export function pkgConfigVersion(env) {
  return probe('pkg-config', ['--modversion', 'python3-embed'], env)
}

/** @param {NodeJS.ProcessEnv} env @param {string | undefined} wanted `3.11` */
function requireEmbedding(env, wanted) {
  const found = pkgConfigVersion(env)
  if (found === undefined) {
    const tool = probe('pkg-config', ['--version'], env) === undefined
    throw new Missing(
      tool ? 'there is no pkg-config, by which pymport finds libpython' : 'there are no Python headers (python3-embed)',
      headers(wanted),
    )
  }
  if (wanted !== undefined && found !== wanted) {
    throw new Missing(
      `EPMOE_PYTHON=${settings.python} is Python ${wanted}, but the only libpython with headers is ${found}`,
      `${headers(wanted)}, or name an interpreter of Python ${found}`,
    )
  }
}

/** The environment in which pkg-config and the linker find an interpreter's own libpython. @param {string} python */
function environmentOf(python) {
  const script =
    'import sysconfig as s; print(s.get_config_var("LIBPC") or ""); print(s.get_config_var("LIBDIR") or "")'
  const [packages = '', libraries = ''] = (probe(python, ['-c', script]) ?? '').split('\n')
  const { PKG_CONFIG_PATH, LDFLAGS } = process.env
  return {
    ...process.env,
    PKG_CONFIG_PATH: [packages, PKG_CONFIG_PATH].filter(Boolean).join(':'),
    LDFLAGS: [LDFLAGS, libraries && `-Wl,-rpath,${libraries}`].filter(Boolean).join(' '),
  }
}

/** The command that installs what building against libpython needs. @param {string} [version] `3.11` */
export function headers(version) {
  const python = version === undefined ? 'python3' : `python${version}`
  return install({
    'apt-get': `${python}-dev ${python}-venv pkg-config`,
    dnf: `${python}-devel pkgconf-pkg-config`,
    brew: `${version === undefined ? 'python' : `python@${version}`} pkg-config`,
  })
}
