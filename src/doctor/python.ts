import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { env } from '../env.js'
import { packageRoot } from '../package-root.js'
import { findPython, minor, pythonVersion } from '../setup/find-python.mjs'
import { bindingFile, embeddedPython } from '../setup/pymport.mjs'
import { absent, type Finding, fail, ok, warn } from './finding.js'
import { marker, outcomeOf } from './outcome.js'
import { inCheckout, pipInstall, rebuildPymport } from './remedy.js'

interface Package {
  version?: string
  error?: string
}

export interface PythonFacts {
  version: string
  openssl: string
  torch: Package & { cuda?: string | null; available?: boolean; exchange?: boolean }
  triton: Package
  numpy: Package
  sglang: { problem: string | null; version?: string; generation?: string }
}

/** pymport, the interpreter, and what its environment holds. */
export async function examinePython(
  gpus: Promise<number>,
): Promise<{ findings: Finding[]; facts: PythonFacts | undefined }> {
  const embedding = examinePymport()
  const found = findPython({ fromEnvironment: env.python, packageRoot })
  if (found === undefined) {
    const remedy = inCheckout
      ? 'npm run setup'
      : 'EPMOE_PYTHON=/path/to/python, of an environment with torch and triton'
    return { findings: [embedding, fail('interpreter', 'none named, and no .venv', remedy)], facts: undefined }
  }
  const interpreter = examineInterpreter(found)
  if (interpreter.state === 'fail') return { findings: [embedding, interpreter], facts: undefined }
  const { facts, problem } = (await outcomeOf(found.python, ['-c', script, join(packageRoot, 'python')])) as {
    facts: PythonFacts | undefined
    problem: string
  }
  if (facts === undefined) {
    const broken = fail('interpreter', `${found.python}: ${problem}`, 'mend or replace that environment')
    return { findings: [embedding, broken], facts }
  }
  const pip = (packages: string) => pipInstall(found.python, found.source, packages)
  return {
    findings: [
      embedding,
      interpreter,
      openssl(facts),
      torch(facts, (await gpus) > 0, pip('torch')),
      triton(facts, pip('triton')),
      package_('numpy', facts.numpy, pip('numpy')),
      sglang(facts),
    ],
    facts,
  }
}

function examinePymport(): Finding {
  const file = bindingFile()
  if (file === undefined) return fail('pymport', 'its native part is not built', rebuildPymport)
  return ok('pymport', `built with libpython ${embeddedPython() ?? 'of unknown version'}`)
}

function examineInterpreter({ python, source }: { python: string; source: string }): Finding {
  const version = pythonVersion(python)
  const where = `${python} (from ${source})`
  if (version === undefined) {
    const base = staleBase(python)
    return base === undefined
      ? fail('interpreter', `${where} does not run`, 'EPMOE_PYTHON=/path/to/python')
      : fail(
          'interpreter',
          `${where} does not run: the environment was made from ${base}, which is gone`,
          `rm -r ${dirname(dirname(python))}, then ${inCheckout ? 'npm run setup' : 'make the environment again'}`,
        )
  }
  const embedded = embeddedPython()
  if (embedded === undefined || minor(version) === embedded) return ok('interpreter', `${version}, ${where}`)
  return fail(
    'interpreter',
    `${version}, ${where}, but pymport is built with libpython ${embedded}`,
    `EPMOE_PYTHON=/path/to/python${embedded}, or ${rebuildPymport} with that interpreter's pkg-config first`,
  )
}

/** The folder of the interpreter that a virtual environment was made from, when that interpreter is there no more. */
function staleBase(python: string): string | undefined {
  const configuration = join(dirname(dirname(python)), 'pyvenv.cfg')
  if (!existsSync(configuration)) return undefined
  const home = /^home\s*=\s*(.+)$/m.exec(readFileSync(configuration, 'utf8'))?.[1]?.trim()
  if (home === undefined) return undefined
  const there = existsSync(home) && readdirSync(home).some((name) => /^python3(\.\d+)?$/.test(name))
  return there ? undefined : home
}

/** Python's ssl runs on Node's OpenSSL once both are in one process. */
function openssl(facts: PythonFacts): Finding {
  const nodes = process.versions.openssl
  const pythons = facts.openssl.replace(/^OpenSSL /, '').split(' ')[0] ?? ''
  const value = `Node ${nodes}, Python ${pythons === '' ? 'none' : pythons}`
  if (pythons === '' || pythons.split('.')[0] === nodes.split('.')[0]) return ok('OpenSSL', value)
  return warn('OpenSSL', value, 'use a Python built with the same major version, or do not use its ssl module')
}

function torch({ torch: found }: PythonFacts, gpu: boolean, remedy: string): Finding {
  const finding = package_('torch', found, remedy)
  if (finding.state !== 'ok') return finding
  const protocol = found.exchange ? '' : ', tensors cross by __dlpack__: no exchange table'
  if (found.available) return ok('torch', `${found.version}, CUDA ${found.cuda}${protocol}`)
  if (!gpu) return ok('torch', `${found.version}, CPU${protocol}`)
  const why = found.cuda === null ? 'is a build without CUDA' : 'does not reach the GPU'
  return warn('torch', `${found.version} ${why}`, `install a torch for this driver: ${remedy}`)
}

function triton(facts: PythonFacts, remedy: string): Finding {
  const finding = package_('triton', facts.triton, remedy)
  if (finding.state !== 'ok') return finding
  const { version } = facts.triton
  if (!facts.torch.available) return ok('triton', `${version}, will interpret: no GPU`)
  if (process.env['TRITON_INTERPRET'] !== '1') return ok('triton', `${version}, will compile`)
  return warn('triton', `${version}, will interpret: TRITON_INTERPRET=1`, 'unset TRITON_INTERPRET')
}

function package_(name: string, found: Package, remedy: string): Finding {
  return found.version === undefined ? fail(name, found.error ?? 'cannot be imported', remedy) : ok(name, found.version)
}

function sglang({ sglang: found }: PythonFacts): Finding {
  const remedy = 'EPMOE_SGLANG=/folder/with/sglang, or an environment with sglang 0.4.6 to 0.5.3, or 0.5.13 and later'
  if (found.problem === null) return ok('SGLang', `version ${found.version}, kernel generation ${found.generation}`)
  return found.version === undefined
    ? absent('SGLang', found.problem, `${remedy}, to compare with its own kernel`)
    : warn('SGLang', found.problem, remedy)
}

const script = `
import json, sys
sys.path.insert(0, sys.argv[1])
def package(name, more=lambda module: {}):
    try:
        module = __import__(name)
        return {"version": module.__version__, **more(module)}
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {error}"}
def sglang():
    try:
        from epmoe import sglang_original
        found = sglang_original.find()
        version = {} if found.path is None and found.version == "unknown" else {"version": found.version}
        problem = found.problem_of(sglang_original.POST_REORDER)
        return {"problem": problem, "generation": found.generation, **version}
    except BaseException as error:
        return {"problem": f"{type(error).__name__}: {error}"}
try:
    import ssl
    openssl = ssl.OPENSSL_VERSION
except ImportError:
    openssl = ""
cuda = lambda torch: {"cuda": torch.version.cuda, "available": torch.cuda.is_available(),
    "exchange": hasattr(torch.Tensor, "__dlpack_c_exchange_api__")}
facts = {"version": sys.version.split()[0], "openssl": openssl, "torch": package("torch", cuda),
    "triton": package("triton"), "numpy": package("numpy"), "sglang": sglang()}
print("\\n${marker}" + json.dumps(facts))
`
