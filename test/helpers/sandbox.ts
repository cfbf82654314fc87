import { spawnSync } from 'node:child_process'
import { chmodSync, cpSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import type { ExecutionContext } from 'ava'

const root = fileURLToPath(new URL('../..', import.meta.url))

/** A copy of the package's set-up in a folder of its own, on a machine that has nothing but what a test puts there. */
export class Sandbox {
  readonly folder = mkdtempSync(join(tmpdir(), 'epmoe-test-'))
  readonly #bin = join(this.folder, 'bin')

  constructor(t: ExecutionContext) {
    t.teardown(() => rmSync(this.folder, { recursive: true, force: true }))
    for (const file of ['package.json', 'package-lock.json', 'src/setup', 'csrc', 'python/requirements.txt']) {
      cpSync(join(root, file), join(this.folder, file), { recursive: true })
    }
    mkdirSync(this.#bin)
    for (const name of ['cat', 'mkdir', 'cp', 'chmod']) symlinkSync(`/bin/${name}`, join(this.#bin, name))
  }

  /** Puts a shell script on PATH. It logs how it is called. */
  command(name: string, script: string): void {
    const body = `#!/bin/sh\necho "${name} $*" >> '${this.folder}/calls'\n${script}\n`
    this.write(`bin/${name}`, body)
    chmodSync(join(this.#bin, name), 0o755)
  }

  write(file: string, text: string): void {
    mkdirSync(dirname(join(this.folder, file)), { recursive: true })
    writeFileSync(join(this.folder, file), text)
  }

  /** pymport as npm installs it, its binding linked with this libpython; undefined: not built. */
  pymport(version: string | undefined): void {
    this.write('node_modules/pymport/package.json', '{"name":"pymport","main":"./lib/index.js"}')
    this.write('node_modules/pymport/lib/index.js', '')
    const binding = `node_modules/pymport/lib/binding/${process.platform}-${process.arch}/pymport.node`
    if (version !== undefined) this.write(binding, `\0libpython${version}.so.1.0\0`)
  }

  /** The commands that were run, one a line. */
  calls(): string {
    return readFileSync(join(this.folder, 'calls'), 'utf8')
  }

  /** Runs one step of the set-up: an exported function of a module in src/setup. */
  step(module: string, name: string, environment: Record<string, string> = {}) {
    const program = `
      import { ${name} } from './src/setup/${module}.mjs'
      import { explain, step } from './src/setup/step.mjs'
      try { await step('it', ${name}) } catch (error) { explain(error) }`
    return this.node(['--input-type=module', '--eval', program], environment)
  }

  node(args: string[], environment: Record<string, string> = {}) {
    const { status, stdout, stderr } = spawnSync(process.execPath, args, {
      cwd: this.folder,
      encoding: 'utf8',
      env: { PATH: this.#bin, HOME: this.folder, ...environment },
    })
    return { status, output: stdout + stderr }
  }
}
