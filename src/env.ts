/** The only reader of the process's EPMOE_* variables. */
export const env = {
  /** The interpreter whose environment (torch, triton) Python code is to use. */
  get python(): string | undefined {
    return read('EPMOE_PYTHON')
  },
  /** A folder that holds epmoe.node and libepmoe, instead of the package's own build. */
  get nativeFolder(): string | undefined {
    return read('EPMOE_NATIVE')
  },
  /** The commit that a copy without .git was made of, for reports. */
  get commit(): string | undefined {
    return read('EPMOE_COMMIT')
  },
  /** The epmoe.migrate.json that is meant. */
  get migrate(): string | undefined {
    return read('EPMOE_MIGRATE')
  },
  /** Prints stacks where the command line would print one line. */
  get debug(): boolean {
    return read('EPMOE_DEBUG') !== undefined
  },
}

function read(name: string): string | undefined {
  const value = process.env[name]
  return value === undefined || value === '' || value === '0' ? undefined : value
}
