import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'
import { delimiter, dirname, join } from 'node:path'
import { isMainThread } from 'node:worker_threads'
import { env } from '../env.js'
import { EpmoeError } from '../errors.js'
import { nativeFolder } from '../native.js'
import { packageRoot } from '../package-root.js'
import { findPython, minor, pythonVersion } from '../setup/find-python.mjs'
import { exitWith } from './exit.js'
import type { Pymport } from './pymport.js'
import { Python } from './python.js'
import { Runtime } from './runtime.js'

export interface StartOptions {
  /** The interpreter whose environment to use. Otherwise EPMOE_PYTHON, VIRTUAL_ENV, ./.venv, or the package's own. */
  python?: string
}

let started: Python | undefined

/**
 * Starts CPython inside this process, or returns the one that runs. It sees the packages of the chosen interpreter's
 * environment. Environment variables that Python or CUDA read at start must be set before.
 */
export function startPython(options: StartOptions = {}): Python {
  started ??= start(options)
  return started
}

function start(options: StartOptions): Python {
  if (!isMainThread) {
    throw failure(
      'the main thread',
      'a worker',
      'Start Python in the main thread; a worker that ends would take it along',
    )
  }
  const { python, version } = choose(options)
  const pymport = load(python)
  const library = pymport.version.pythonLibrary
  const embedded = `${library.major}.${library.minor}`
  if (minor(version) !== embedded) {
    throw failure(
      `an interpreter of Python ${embedded}, the version pymport was built against`,
      `${python}, which is ${version}`,
      `Choose another with EPMOE_PYTHON, or build pymport against this one: put it first on PATH and run \`npm rebuild pymport\``,
    )
  }
  const { PyObject } = pymport
  pymport
    .pymport('sys')
    .get('path')
    .get('insert')
    .call(PyObject.int(0), PyObject.string(join(packageRoot, 'python')))
  const bridge = pymport.pymport('epmoe._bridge')
  const exact = bridge.get('prepare').call(PyObject.string(python)).toJS() as string
  const runtime = new Runtime(pymport, bridge)
  exitWith(runtime)
  return new Python(runtime, exact, python)
}

function choose(options: StartOptions): { python: string; version: string } {
  const found = findPython({ python: options.python, fromEnvironment: env.python, packageRoot })
  if (found === undefined) {
    throw failure(
      'a Python interpreter',
      'none named: no python option, EPMOE_PYTHON, VIRTUAL_ENV or .venv',
      'Run `npm run setup` in a checkout, or name one: EPMOE_PYTHON=/path/to/python',
    )
  }
  const version = pythonVersion(found.python)
  if (version === undefined) {
    throw failure('an interpreter that runs', `${found.python} (from ${found.source})`, 'Check the path')
  }
  return { python: found.python, version }
}

/** Loads pymport, and with it libpython, so that the interpreter takes itself for `python`. */
function load(python: string): Pymport {
  const path = process.env['PATH']
  process.env['PYTHONEXECUTABLE'] = python
  process.env['PATH'] = [dirname(python), path].filter(Boolean).join(delimiter)
  process.env['PYTHONUNBUFFERED'] ??= '1'
  process.env['EPMOE_LIBRARY'] ??= join(
    nativeFolder(),
    process.platform === 'darwin' ? 'libepmoe.dylib' : 'libepmoe.so',
  )
  // Python's ssl runs on Node's OpenSSL here and would look for certificates where Node's build says.
  const certificates = '/etc/ssl/certs/ca-certificates.crt'
  if (process.env['SSL_CERT_FILE'] === undefined && existsSync(certificates))
    process.env['SSL_CERT_FILE'] = certificates
  try {
    return createRequire(import.meta.url)('pymport') as Pymport
  } catch (cause) {
    throw failure(
      'pymport with its native part',
      (cause instanceof Error ? cause.message : String(cause)).split('\n')[0] ?? '',
      'It needs Python headers, pkg-config and a C++ compiler to build; with these, `npm install` or `npm rebuild pymport`',
      cause,
    )
  } finally {
    if (path === undefined) delete process.env['PATH']
    else process.env['PATH'] = path
    delete process.env['PYTHONEXECUTABLE']
  }
}

function failure(expected: string, received: string, hint: string, cause?: unknown): EpmoeError {
  return new EpmoeError({ code: 'ERR_PYTHON_START', op: 'startPython', expected, received, hint }, { cause })
}
