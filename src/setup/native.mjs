// Builds libepmoe and the addon into build/Release with cmake-js.
import { existsSync, readFileSync, rmSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { settings } from './settings.mjs'
import { filesIn, fresh, hashOf, mark } from './stamp.mjs'
import { cores, inRoot, install, Missing, probe, root, run } from './step.mjs'

const addon = inRoot('build/Release/epmoe.node')

/** @returns {Promise<{ remark: string }>} */
export async function buildNative() {
  const { cmake, compiler } = requireTools()
  const nvcc = settings.cuda === 'off' ? undefined : findNvcc()
  if (settings.cuda === 'on' && nvcc === undefined) {
    throw new Missing(
      'EPMOE_CUDA=1, but there is no nvcc: not CUDACXX, not on PATH, not in CUDA_HOME or /usr/local/cuda',
      'install the CUDA toolkit, or put its bin folder on PATH',
    )
  }
  const kind = nvcc === undefined ? `CPU only: ${settings.cuda === 'off' ? 'EPMOE_CUDA=0' : 'no nvcc'}` : 'with CUDA'
  const { version } = JSON.parse(readFileSync(inRoot('package.json'), 'utf8'))
  const facts = [root, process.version, process.arch, compiler, cmake, nvcc?.version ?? '', nvcc?.path ?? '', version]
  const configuration = hashOf([], [...facts, settings.cudaArchitectures ?? ''])
  const value = hashOf(filesIn(inRoot('csrc')), [configuration])
  if (fresh(inRoot('build/.epmoe-stamp'), value) && existsSync(addon)) return { remark: `unchanged, ${kind}` }

  // CMake remembers compilers and paths: another configuration starts afresh, other sources compile what has changed.
  const configured = inRoot('build/.epmoe-configuration')
  if (!fresh(configured, configuration)) rmSync(inRoot('build'), { recursive: true, force: true })
  mark(configured, configuration)
  const options =
    nvcc === undefined ? ['--CDEPMOE_CUDA=off'] : ['--CDEPMOE_CUDA=on', `--CDCMAKE_CUDA_COMPILER=${nvcc.path}`]
  const cmakeJs = createRequire(inRoot('package.json')).resolve('cmake-js/bin/cmake-js')
  const args = [cmakeJs, 'compile', '--directory', 'csrc', '--out', 'build', '--parallel', String(cores), ...options]
  const log = await run(process.execPath, args, {
    remedy: `see the log above; ${nvcc === undefined ? '' : 'EPMOE_CUDA=0 builds without CUDA; '}removing build/ starts afresh`,
  })
  if (!existsSync(addon)) throw new Missing(`the build made no ${addon}`, 'remove build/ and try again', log)
  mark(inRoot('build/.epmoe-stamp'), value)
  return { remark: `built ${kind}` }
}

function requireTools() {
  const [command = 'c++', ...launched] = (process.env['CXX'] || 'c++').split(' ')
  const compiler = probe(command, [...launched, '--version'])
  if (compiler === undefined) {
    const remedy = install({ 'apt-get': 'g++', dnf: 'gcc-c++', brew: 'llvm' })
    throw new Missing(`there is no C++ compiler (${command})`, remedy)
  }
  const cmake = probe('cmake', ['--version'])
  if (cmake === undefined) {
    throw new Missing('there is no CMake (cmake)', install({ 'apt-get': 'cmake', dnf: 'cmake', brew: 'cmake' }))
  }
  if (probe('make', ['--version']) === undefined && probe('ninja', ['--version']) === undefined) {
    throw new Missing('there is neither make nor ninja', install({ 'apt-get': 'make', dnf: 'make', brew: 'make' }))
  }
  return { compiler, cmake }
}

/** The first nvcc that runs: toolkits are often installed without being on PATH. */
export function findNvcc() {
  const { CUDACXX, CUDA_HOME, CUDA_PATH } = process.env
  const folders = [CUDA_HOME, CUDA_PATH, '/usr/local/cuda'].flatMap((folder) => folder || [])
  for (const path of [CUDACXX || [], 'nvcc', ...folders.map((folder) => join(folder, 'bin', 'nvcc'))].flat()) {
    const version = probe(path, ['--version'])
    if (version !== undefined) return { path, version }
  }
  return undefined
}
