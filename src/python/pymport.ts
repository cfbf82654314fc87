/** The part of pymport that is used; its own declarations are out of reach of ESM resolution. */
export interface PyObject {
  readonly id: number | bigint
  readonly callable: boolean
  get(name: string): PyObject
  item(key: PyObject): PyObject
  call(...args: PyObject[]): PyObject
  toJS(): unknown
}

export interface Pymport {
  pymport(module: string): PyObject
  version: { pythonLibrary: { major: number; minor: number; micro: number } }
  PyObject: {
    new (): PyObject
    int(value: number): PyObject
    string(value: string): PyObject
    memoryview(buffer: Buffer): PyObject
    func(fn: (request: PyObject) => number): PyObject
  }
}
