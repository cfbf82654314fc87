// The Python environment: the one that EPMOE_PYTHON names, as it is, or a venv of our own with what we need.
import { existsSync } from 'node:fs'
import { pythonVersion, findPython, minor } from './find-python.mjs'
import { requireEmbedding } from './node-modules.mjs'
import { settings } from './settings.mjs'
import { fresh, hashOf, mark } from './stamp.mjs'
import { Missing, inRoot, install, probe, root, run } from './step.mjs'

const needed = ['torch', 'triton', 'numpy']

/** @returns {Promise<string>} a remark */
export async function preparePython() {
  return settings.python === undefined ? ownVenv() : existing(settings.python)
}

/** @param {string} named */
function existing(named) {
  const found = findPython({ fromEnvironment: named, packageRoot: root })
  const python = found?.python ?? named
  const version = pythonVersion(python)
  if (version === undefined) throw new Missing(`EPMOE_PYTHON=${named} does not run`, 'name an interpreter that does')
  requireVersion(python, version)
  const check = `import importlib.util as u; print(" ".join(n for n in ${JSON.stringify(needed)} if u.find_spec(n) is None))`
  const missing = probe(python, ['-c', check])
  if (missing) {
    throw new Missing(
      `the environment of ${python} lacks ${missing.split(' ').join(', ')}; it is yours, so nothing is installed into it`,
      `${python} -m pip install -r python/requirements.txt`,
    )
  }
  return `${python} (${version})`
}

async function ownVenv() {
  const python = inRoot('.venv/bin/python')
  const requirements = inRoot('python/requirements.txt')
  const libpython = requireEmbedding()
  const value = hashOf([requirements], [libpython])
  const stamp = inRoot('.venv/.epmoe-stamp')
  if (existsSync(python) && fresh(stamp, value)) return 'unchanged'
  const base = interpreterOf(libpython)
  await run(base, ['-m', 'venv', '--clear', inRoot('.venv')], {
    remedy: install({ 'apt-get': 'python3-venv', dnf: 'python3', brew: 'python' }),
  })
  await run(python, ['-m', 'pip', 'install', '--disable-pip-version-check', '--retries', '1', '-r', requirements], {
    remedy: 'check that pip reaches its index, or name an environment that has torch and triton: EPMOE_PYTHON=/path/to/python',
  })
  mark(stamp, value)
  return `made with ${base}`
}

/** An interpreter of libpython's own version: others would not find its packages. @param {string} libpython `3.11` */
function interpreterOf(libpython) {
  const prefix = probe('pkg-config', ['--variable=exec_prefix', 'python3-embed'])
  const candidates = [`${prefix ?? '/usr'}/bin/python${libpython}`, `python${libpython}`, 'python3']
  for (const candidate of candidates) {
    const version = probe(candidate, ['-c', 'import sys; print("%d.%d" % sys.version_info[:2])'])
    if (version === libpython) return candidate
  }
  throw new Missing(
    `libpython is ${libpython}, but no interpreter of that version was found (tried ${candidates.join(', ')})`,
    install({ 'apt-get': `python${libpython} python${libpython}-venv`, dnf: `python${libpython}`, brew: `python@${libpython}` }),
  )
}

/** @param {string} python @param {string} version */
function requireVersion(python, version) {
  const libpython = probe('pkg-config', ['--modversion', 'python3-embed'])
  if (libpython === undefined || minor(version) === minor(libpython)) return
  throw new Missing(
    `${python} is Python ${version}, but pymport is built against libpython ${libpython}`,
    `put the pkg-config of Python ${minor(version)} first (PKG_CONFIG_PATH) and run \`npm rebuild pymport\`, or choose a Python ${libpython}`,
  )
}
