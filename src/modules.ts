import { readdirSync } from 'node:fs'

/** The default exports of every module in a folder, in order of name: what is dropped there is found, and listed nowhere. */
export async function defaultsIn<Exported>(folder: URL): Promise<Exported[]> {
  const files = readdirSync(folder).filter((file) => /\.(ts|js)$/.test(file) && !file.endsWith('.d.ts'))
  const modules = files.sort().map((file) => import(new URL(file, folder).href) as Promise<{ default: Exported }>)
  return (await Promise.all(modules)).map((module) => module.default)
}
