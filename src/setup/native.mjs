// Builds libepmoe and the addon into build/Release with cmake-js.
import { createRequire } from 'node:module'
import { existsSync, rmSync } from 'node:fs'
import { settings } from './settings.mjs'
import { filesIn, fresh, hashOf, mark } from './stamp.mjs'
import { Missing, cores, inRoot, install, probe, run } from './step.mjs'

/** @returns {Promise<string>} a remark */
export async function buildNative() {
  requireTools()
  const nvcc = settings.cuda === 'off' ? undefined : probe('nvcc', ['--version'])
  if (settings.cuda === 'on' && nvcc === undefined) {
    throw new Missing('EPMOE_CUDA=1, but nvcc is not on PATH', 'install the CUDA toolkit, or put its bin folder on PATH')
  }
  const value = hashOf(filesIn(inRoot('csrc')), [
    process.version,
    process.arch,
    nvcc ?? 'no nvcc',
    settings.cudaArchitectures ?? '',
    JSON.parse(JSON.stringify(createRequire(inRoot('package.json'))('./package.json'))).version,
  ])
  const stamp = inRoot('build/.epmoe-stamp')
  const remark = nvcc === undefined ? 'CPU only: no nvcc' : 'with CUDA'
  if (fresh(stamp, value) && existsSync(inRoot('build/Release/epmoe.node'))) return `unchanged, ${remark}`
  // A configuration made by another compiler or on another path would be reused, and fail.
  rmSync(inRoot('build'), { recursive: true, force: true })
  const cmakeJs = createRequire(inRoot('package.json')).resolve('cmake-js/bin/cmake-js')
  const log = await run(
    process.execPath,
    [
      cmakeJs,
      'compile',
      '--directory',
      'csrc',
      '--out',
      'build',
      '--parallel',
      String(cores),
      `--CDEPMOE_CUDA=${nvcc === undefined ? 'off' : 'on'}`,
    ],
    { remedy: 'see the log above; `npm run setup` tries again' },
  )
  if (!existsSync(inRoot('build/Release/epmoe.node'))) throw new Missing('the build made no epmoe.node', '', log)
  mark(stamp, value)
  return remark
}

function requireTools() {
  const compiler = process.env['CXX'] ?? 'c++'
  if (probe(compiler, ['--version']) === undefined) {
    const remedy = install({ 'apt-get': 'g++', dnf: 'gcc-c++', brew: 'llvm' })
    throw new Missing(`there is no C++ compiler (${compiler})`, remedy)
  }
  if (probe('cmake', ['--version']) === undefined) {
    throw new Missing('there is no CMake', install({ 'apt-get': 'cmake', dnf: 'cmake', brew: 'cmake' }))
  }
  if (probe('make', ['--version']) === undefined && probe('ninja', ['--version']) === undefined) {
    throw new Missing('there is neither make nor ninja', install({ 'apt-get': 'make', dnf: 'make', brew: 'make' }))
  }
}
