// The Python environment: the one that EPMOE_PYTHON names, as it is, or a venv of our own with what we need.
import { findPython, minor, pythonVersion } from './find-python.mjs'
import { embeddedPython } from './pymport.mjs'
import { settings } from './settings.mjs'
import { inRoot, install, Missing, probe, root } from './step.mjs'
import { addToVenv, makeVenv, versionOf } from './venv.mjs'

const needed = ['torch', 'triton', 'numpy']

/** @returns {Promise<{ remark: string, python: string }>} */
export async function preparePython() {
  return settings.python === undefined ? ownVenv() : existing(settings.python)
}

/** @param {string} named */
function existing(named) {
  const python = findPython({ fromEnvironment: named, packageRoot: root })?.python ?? named
  const version = pythonVersion(python)
  const libpython = embeddedPython()
  if (version === undefined) throw new Missing(`EPMOE_PYTHON=${named} does not run`, 'name an interpreter that does')
  if (libpython !== undefined && minor(version) !== libpython) {
    throw new Missing(
      `${python} is Python ${version}, but pymport is built with libpython ${libpython}`,
      `name an interpreter of Python ${libpython}, or remove node_modules/pymport/lib/binding and try again`,
    )
  }
  const check = `import importlib.util as u; print(" ".join(n for n in ${JSON.stringify(needed)} if u.find_spec(n) is None))`
  const missing = probe(python, ['-c', check])
  if (missing) {
    throw new Missing(
      `the environment of ${python} lacks ${missing.split(' ').join(', ')}; it is yours, so nothing is installed into it`,
      `${python} -m pip install ${missing === needed.join(' ') ? '-r python/requirements.txt' : missing}`,
    )
  }
  return { remark: `${python}, ${version}`, python }
}

async function ownVenv() {
  const version = embeddedPython()
  if (version === undefined) throw new Missing('it is not known which libpython pymport links', 'npm rebuild pymport')
  return makeVenv({
    folder: inRoot('.venv'),
    requirements: inRoot('python/requirements.txt'),
    version,
    base: () => interpreterOf(version),
  })
}

/** An interpreter of libpython's own version: the packages of others do not load in it. @param {string} version `3.11` */
function interpreterOf(version) {
  const prefix = probe('pkg-config', ['--variable=exec_prefix', 'python3-embed'])
  const candidates = [`${prefix ?? '/usr'}/bin/python${version}`, `python${version}`, 'python3']
  const found = candidates.find((candidate) => versionOf(candidate) === version)
  if (found !== undefined) return found
  throw new Missing(
    `libpython is ${version}, but there is no interpreter of that version (tried ${candidates.join(', ')})`,
    install({
      'apt-get': `python${version} python${version}-venv`,
      dnf: `python${version}`,
      brew: `python@${version}`,
    }),
  )
}

/** What the tests compare with, in our own venv; an environment that EPMOE_PYTHON names may have it or not. */
export async function prepareTests() {
  if (settings.python !== undefined) return { remark: 'as EPMOE_PYTHON has it' }
  return addToVenv({ folder: inRoot('.venv'), requirements: inRoot('python/requirements-test.txt') })
}
