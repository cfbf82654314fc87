import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { env } from '../env.js'
import { nativeFolder } from '../native.js'
import { packageRoot, packageVersion } from '../package-root.js'
import { findPython, minor, pythonVersion } from '../setup/find-python.mjs'
import { askNode, askPython, commandOutput } from './probe.js'

export interface Check {
  name: string
  /** `absent` is a fact, `warn` limits something, `fail` stops the main job. */
  state: 'ok' | 'warn' | 'fail' | 'absent'
  value: string
  /** The command, or the step, that mends it. */
  remedy?: string
}

const askPymport = 'process.stdout.write(JSON.stringify(require("pymport").version.pythonLibrary))'

/** Looks at everything epmoe rests on. Each probe that could crash runs in a process of its own. */
export function runChecks(): Check[] {
  const python = pythonChecks()
  return [...nodeChecks(), ...toolChecks(), ...nativeChecks(), ...python, ...gpuChecks()]
}

function nodeChecks(): Check[] {
  const [major = 0, minorVersion = 0] = process.versions.node.split('.').map(Number)
  const recent = major > 20 || (major === 20 && minorVersion >= 19)
  const pymport = join(packageRoot, 'node_modules/pymport')
  const binding = askNode(askPymport)
  return [
    { name: 'epmoe', state: 'ok', value: packageVersion },
    recent
      ? { name: 'Node', state: 'ok', value: process.version }
      : { name: 'Node', state: 'fail', value: process.version, remedy: 'install Node 20.19 or newer' },
    binding.value === undefined
      ? {
          name: 'pymport',
          state: 'fail',
          value: existsSync(pymport) ? `does not load: ${binding.error}` : 'not installed',
          remedy: existsSync(pymport) ? 'npm rebuild pymport --build-from-source' : 'npm run setup',
        }
      : {
          name: 'pymport',
          state: 'ok',
          value: `with libpython ${['major', 'minor', 'micro'].map((key) => binding.value![key]).join('.')}`,
        },
  ]
}

function toolChecks(): Check[] {
  const tool = (name: string, command: string, args: string[], remedy: string): Check => {
    const line = commandOutput(command, args)?.split('\n')
    const text = line?.find((each) => /\d+\.\d+/.test(each))
    return text === undefined
      ? { name, state: 'warn', value: 'not found', remedy }
      : { name, state: 'ok', value: text.trim() }
  }
  const nvcc = tool('nvcc', 'nvcc', ['--version'], 'install the CUDA toolkit to build the GPU kernels')
  return [
    tool('C++ compiler', process.env['CXX'] ?? 'c++', ['--version'], 'sudo apt-get install g++'),
    tool('CMake', 'cmake', ['--version'], 'sudo apt-get install cmake'),
    tool(
      'Python headers',
      'pkg-config',
      ['--modversion', 'python3-embed'],
      'sudo apt-get install python3-dev pkg-config',
    ),
    nvcc.state === 'ok' ? nvcc : { ...nvcc, state: 'absent' },
  ]
}

function nativeChecks(): Check[] {
  const file = join(nativeFolder(), 'epmoe.node')
  if (!existsSync(file))
    return [{ name: 'addon', state: 'fail', value: `not built (${file})`, remedy: 'npm run setup' }]
  const { value, error } = askNode(`const a = require(${JSON.stringify(file)})
    process.stdout.write(JSON.stringify({ version: a.version, abi: a.abiVersion === a.headerAbiVersion, cuda: a.device.cudaCompiled, count: a.device.cudaCount(), ops: a.ops().map((o) => o.name) }))`)
  if (value === undefined)
    return [{ name: 'addon', state: 'fail', value: `does not load: ${error}`, remedy: 'npm run setup' }]
  if (value['abi'] !== true) {
    return [
      {
        name: 'addon',
        state: 'fail',
        value: 'beside a libepmoe of another build',
        remedy: 'rm -rf build && npm run setup',
      },
    ]
  }
  const kernels = value['cuda'] === true ? 'CUDA and CPU' : 'CPU only'
  return [
    {
      name: 'addon',
      state: 'ok',
      value: `libepmoe ${value['version']}, ${kernels}; ops: ${(value['ops'] as string[]).join(', ')}`,
    },
  ]
}

const survey = `
import json, sys
found = {"version": "%d.%d.%d" % sys.version_info[:3], "prefix": sys.prefix}
for name in ("torch", "triton", "numpy"):
    try:
        module = __import__(name)
        found[name] = module.__version__
    except Exception as error:
        found[name + "_error"] = f"{type(error).__name__}: {error}"
if "torch" in found:
    import torch
    found["cuda"] = torch.version.cuda
    found["gpus"] = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found["exchange"] = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
import ssl
found["openssl"] = ssl.OPENSSL_VERSION
print(json.dumps(found))`

function pythonChecks(): Check[] {
  const found = findPython({ fromEnvironment: env.python, packageRoot })
  if (found === undefined)
    return [{ name: 'Python', state: 'fail', value: 'no interpreter named', remedy: 'npm run setup' }]
  const version = pythonVersion(found.python)
  const facts = askPython(found.python, survey)
  if (version === undefined || facts === undefined) {
    return [
      {
        name: 'Python',
        state: 'fail',
        value: `${found.python} (from ${found.source}) does not run`,
        remedy: 'npm run setup, or name another with EPMOE_PYTHON',
      },
    ]
  }
  const library = askNode(askPymport).value
  const embedded = library === undefined ? undefined : `${library['major']}.${library['minor']}`
  const fits = embedded === undefined || embedded === minor(version)
  const own = `${found.python} (from ${found.source})`
  const module = (name: string, extra: string): Check =>
    facts[name] === undefined
      ? {
          name,
          state: 'fail',
          value: String(facts[`${name}_error`]),
          remedy: `${found.python} -m pip install -r python/requirements.txt`,
        }
      : { name, state: 'ok', value: `${String(facts[name])}${extra}` }
  const gpus = Number(facts['gpus'] ?? 0)
  const torchExtra = ` (${facts['cuda'] === null ? 'CPU build' : `CUDA ${String(facts['cuda'])}`}, exchange table: ${facts['exchange'] === true ? 'yes' : 'no, tensors cross by __dlpack__'})`
  return [
    fits
      ? { name: 'Python', state: 'ok', value: `${version}, ${own}` }
      : {
          name: 'Python',
          state: 'fail',
          value: `${own} is ${version}, but pymport has libpython ${embedded}`,
          remedy: `choose a Python ${embedded} with EPMOE_PYTHON, or rebuild pymport against this one`,
        },
    module('torch', torchExtra),
    module('triton', gpus > 0 ? ' (compiles for the GPU)' : ' (no GPU: kernels are interpreted)'),
    module('numpy', ''),
    openssl(String(facts['openssl'])),
    sglang(found.python),
  ]
}

/** Inside Node, Python's ssl module is bound to Node's OpenSSL; another major version would crash. */
function openssl(python: string): Check {
  const theirs = /(\d+)\.\d+/.exec(python)?.[1]
  const value = `Node ${process.versions.openssl}, Python ${python}`
  if (theirs === process.versions.openssl.split('.')[0]) return { name: 'OpenSSL', state: 'ok', value }
  return {
    name: 'OpenSSL',
    state: 'warn',
    value,
    remedy: 'avoid ssl in embedded Python, or use a Node with the same major version',
  }
}

function sglang(python: string): Check {
  const package_ = JSON.stringify(join(packageRoot, 'python'))
  const facts = askPython(
    python,
    `import json, os, sys; os.environ.setdefault("TRITON_INTERPRET", "1"); sys.path.insert(0, ${package_}); from epmoe import sglang_original as s; f = s.find(); print(json.dumps({"problem": f.problem, "version": f.version, "generation": f.generation}))`,
  )
  if (facts === undefined) return { name: 'SGLang', state: 'absent', value: 'could not be looked for' }
  if (facts['problem'] === null)
    return {
      name: 'SGLang',
      state: 'ok',
      value: `${String(facts['version'])}, generation ${String(facts['generation'])}`,
    }
  return {
    name: 'SGLang',
    state: 'absent',
    value: String(facts['problem']),
    remedy: 'pip install --no-deps sglang, or EPMOE_SGLANG=/path, to compare with the original kernels',
  }
}

function gpuChecks(): Check[] {
  const driver = commandOutput('nvidia-smi', ['--query-gpu=name,driver_version,memory.total', '--format=csv,noheader'])
  if (driver === undefined)
    return [{ name: 'GPU', state: 'absent', value: 'no NVIDIA driver or device: ops run on the CPU' }]
  const file = join(nativeFolder(), 'epmoe.node')
  const seen = existsSync(file)
    ? askNode(`process.stdout.write(JSON.stringify({ count: require(${JSON.stringify(file)}).device.cudaCount() }))`)
        .value
    : undefined
  const gpus = driver.split('\n').map((line): Check => ({ name: 'GPU', state: 'ok', value: line.trim() }))
  if (seen !== undefined && Number(seen['count']) === 0) {
    gpus.push({
      name: 'GPU',
      state: 'warn',
      value: 'epmoe sees none of them',
      remedy: 'build with nvcc on PATH (npm run setup), and check that the driver is as new as the toolkit',
    })
  }
  return gpus
}
