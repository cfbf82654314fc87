import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { packageRoot } from '../package-root.js'
import { findNvcc } from '../setup/native.mjs'
import { headers, pkgConfigVersion } from '../setup/pymport.mjs'
import { install, probe } from '../setup/step.mjs'
import { absent, type Finding, fail, ok, warn } from './finding.js'
import { installPackages } from './remedy.js'

/** Node, the npm packages, and what building needs. */
export function examineTools(): Finding[] {
  return [node(), packages(), compiler(), cmake(), libpython(), nvcc()]
}

function node(): Finding {
  const [major = 0, minor = 0] = process.versions.node.split('.').map(Number)
  const old = major < 20 || (major === 20 && minor < 19)
  const value = `${process.version} on ${process.platform}-${process.arch}`
  return old ? fail('Node', value, 'install Node 20.19 or newer') : ok('Node', value)
}

function packages(): Finding {
  const { dependencies } = manifest(join(packageRoot, 'package.json')) as { dependencies: Record<string, string> }
  const problems = Object.entries(dependencies).flatMap(([name, wanted]) => {
    const found = versionOf(name)
    if (found === undefined) return [`${name} is missing`]
    return found === wanted ? [] : [`${name} is ${found} instead of ${wanted}`]
  })
  if (problems.length === 0) return ok('npm packages', `all ${Object.keys(dependencies).length}, as pinned`)
  const missing = problems.some((problem) => problem.endsWith('missing'))
  return (missing ? fail : warn)('npm packages', problems.join('; '), installPackages)
}

/** The installed version of a package; its package.json need not be exported. */
function versionOf(name: string): string | undefined {
  const folders = createRequire(join(packageRoot, 'package.json')).resolve.paths(name) ?? []
  for (const folder of folders) {
    const found = manifest(join(folder, name, 'package.json'))
    if (found !== undefined) return (found as { version: string }).version
  }
  return undefined
}

function manifest(file: string): unknown {
  try {
    return JSON.parse(readFileSync(file, 'utf8'))
  } catch {
    return undefined
  }
}

function compiler(): Finding {
  const version = probe('c++', ['--version'])
  const remedy = install({ 'apt-get': 'g++', dnf: 'gcc-c++', brew: 'llvm' })
  return version === undefined
    ? absent('C++ compiler', 'no c++ on PATH', remedy)
    : ok('C++ compiler', version.split('\n')[0]!)
}

function cmake(): Finding {
  const version = probe('cmake', ['--version'])
  const remedy = install({ 'apt-get': 'cmake', dnf: 'cmake', brew: 'cmake' })
  return version === undefined ? absent('CMake', 'not on PATH', remedy) : ok('CMake', version.split('\n')[0]!)
}

function libpython(): Finding {
  const version = pkgConfigVersion()
  return version === undefined
    ? absent('libpython headers', 'pkg-config knows no python3-embed', headers())
    : ok('libpython headers', version)
}

function nvcc(): Finding {
  const found = findNvcc()
  if (found === undefined) {
    return absent('nvcc', 'not found', 'install the CUDA toolkit, or put nvcc on PATH, to build the CUDA kernels')
  }
  const release = /release ([\d.]+)/.exec(found.version)?.[1] ?? 'of unknown version'
  const path = found.path.includes('/') ? dirname(found.path) : 'on PATH'
  return ok('nvcc', `${release}, ${path}`)
}
